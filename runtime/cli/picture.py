"""A bundle's system as lines of text: what goes in, the way from there to the video, its loops, what a memory keeps of a
clip."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from motionrt.runtime.backends.onnx_form import OnnxForm
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import (
    NOISE,
    SCORES,
    ChoiceInput,
    ColumnInput,
    FieldInput,
    ImageInput,
    Loop,
    Manifest,
    MaskInput,
    Node,
    NumberInput,
    TextInput,
    TracksInput,
    reference_name,
)  # fmt: skip
from motionrt.runtime.dtypes import QUANTISED
from motionrt.runtime.errors import BundleError, EngineError, InputError

_LEFT = 46  # columns for what is read
_SHOWN = 4  # names in one place; more are counted


def picture(bundle: Bundle) -> Iterator[str]:
    """The picture, line by line, at most about 110 columns wide."""
    manifest = bundle.manifest
    out = manifest.output
    moving = "" if out.field is None else f"; `{out.field}` is shown as their motion field"
    yield f"{manifest.name}: {out.frames} pictures of {out.width}x{out.height} at {out.fps:g} a second{moving}"
    yield ""
    yield "inputs"
    for name, spec in manifest.inputs.items():
        yield f"  {name:<16} {_kind(manifest, name)}{'' if not spec.help else f'. {spec.help}'}"
    yield ""
    yield "the way to the video: what is read, the graph that runs, what it gives"
    rows = [row for node in manifest.nodes for row in _node(bundle, node)]
    if memory := manifest.memory:
        clips = [reference_name(part.name) for part in memory.record] + [SCORES] * (manifest.port(SCORES) is not None)
        rows[:0] = [([memory.text], memory.query, ["a vector"]), (["a vector"], "MEMORY", clips)]
    left = min(_LEFT, max(len(_names(reads)) for reads, graph, _ in rows if graph))
    middle = max(len(graph) for _, graph, _ in rows)
    for reads, graph, gives in rows:
        if graph:
            *above, last = textwrap.wrap(_names(reads), left)
            yield from (f"  {line:>{left}}" for line in above)
            yield f"  {last:>{left}} ──▶ {graph:^{middle}} ──▶ {_names(gives)}"
        else:
            yield f"  {reads[0]}"
    if memory is not None:
        yield ""
        clip = memory.clip
        yield f"the memory keeps of a clip ({clip.frames} pictures of {clip.width}x{clip.height} at {clip.fps:g} a second)"
        for part in memory.record:
            yield f"  {part.name:<16} {part.dtype} {list(part.dims)}"
        made = f"by {', '.join(memory.graphs)}" if memory.graphs else "as it is cut"
        yield f"  {made}; a request takes {memory.default} clips, up to {memory.max}, by the words of `{memory.text}`"
        without = [f"{name} = {value}" for name, value in memory.absent.items()]
        replaced = [pair for loop in manifest.loops.values() for pair in loop.absent.items()]
        if without := [*without, *(f"{instead} in place of {graph}" for graph, instead in replaced)]:
            yield f"  without a clip: {', '.join(without)}"
    for item in manifest.approximations:
        quality = ", ".join(f"{key} {value}" for key, value in item.quality.items())
        where = [f"the schedule of loop {loop}" for loop in item.schedules] or item.graphs
        yield f"approximation {item.name} in {', '.join(where)}: {quality}"
    for name, loop in manifest.loops.items():
        if (look := loop.preview) is not None:
            quality = ", ".join(f"{key} {value}" for key, value in look.quality.items())
            yield f"preview of `{look.value}` in loop {name}: {quality}"
    yield from _built(bundle)


def _built(bundle: Bundle) -> Iterator[str]:
    """What was built of the bundle in 8 bits, and what that costs in quality."""
    for kind in QUANTISED:
        for path in sorted(bundle.path.glob(f"engines/*-{kind}/*.form")):
            try:
                form = OnnxForm.read(path)
                form.check_origin(bundle.graph(form.graph))
            except (BundleError, EngineError, InputError):
                yield f"approximation in {path}: not of this bundle and version, or damaged (motionrt verify)"
                continue
            yield f"approximation {kind} in {form.graph}, for {form.flavor}: {form.quality or 'quality not measured'}"
        for path in sorted(bundle.path.glob(f"engines/*-{kind}/*.json")):
            yield f"approximation {kind} in {path.stem}, for {path.parent.name}: quality not measured"


def _kind(manifest: Manifest, name: str) -> str:
    match manifest.inputs[name]:
        case ImageInput() as spec:
            return f"a still, fitted to {spec.width}x{spec.height}"
        case TextInput() as spec:
            tokenizer = manifest.tokenizers.get(spec.tokenizer or "")
            text = f"a text of at most {tokenizer.max_length} tokens" if tokenizer else "a text, to search by"
            return text if spec.default is None else f"{text}; {spec.default!r} if not given"
        case NumberInput() as spec:
            span = "" if spec.min is None or spec.max is None else f" from {spec.min:g} to {spec.max:g}"
            return f"a number{span}" + ("" if spec.default is None else f"; {spec.default:g} if not given")
        case ColumnInput() as spec:
            return "a number, or one for each step" + ("" if spec.default is None else f"; {spec.default:g} if not given")
        case TracksInput() as spec:
            bounded = f", inside what `{spec.mask}` lets move" if spec.mask else ""
            return f"drags on `{spec.image}`, or none{bounded}"
        case MaskInput() as spec:
            return f"what may move, painted on `{spec.image}`; everything if not given"
        case FieldInput() as spec:
            return f"a motion field of {spec.frames} frames over `{spec.image}`; made if not given"
        case ChoiceInput() as spec:
            absent = "" if spec.absent is None else f", and {spec.absent} without a clip"
            return f"{' or '.join(spec.options)}; {spec.default} if not given{absent}"


def _node(bundle: Bundle, node: Node) -> Iterator[tuple[list[str], str, list[str]]]:
    """(what is read, the graph, what it gives) of a node; a loop has lines without a graph around it."""
    manifest = bundle.manifest
    loop = manifest.loops.get(node.graph)
    if loop is None:
        ports = [node.reads.get(port.name, port.name) for port in manifest.graphs[node.graph].inputs]
        yield _without_tokens(ports), node.graph, sorted(manifest.gives(node))
        return
    schedules = ", ".join(f"{name} {_span(counts)} steps" for name, counts in loop.schedules.items())
    default = f"{loop.default[1]} steps of {loop.default[0]}" if loop.feeds else f"{loop.default[1]} parts"
    yield [f"┌─ loop {node.graph}: {default}" + (f" (there are {schedules})" if loop.feeds else "")], "", []
    for table in loop.tables:
        gives = [port.name for port in manifest.graphs[table].outputs]
        yield [f"{loop.windows[table]} rows at a time" if table in loop.windows else "all rows at once"], table, gives
    for step, calls in loop.ahead.items():
        for call in calls:
            yield [f"ahead of {step}"], call.graph, sorted(call.writes.values())
    for graph in loop.graphs:
        yield _step_reads(manifest, loop, graph), graph, [port.name for port in manifest.graphs[graph].outputs]
    carried = ", ".join(f"{out} → {into}" for out, into in loop.carry.items() if "." not in into)
    caches = sum("." in into for into in loop.carry.values())
    carried += f"{' and ' if carried else ''}{caches} caches" if caches else ""
    yield [f"│  carried: {carried}" if carried else "│  nothing is carried"], "", []
    for graph, other in loop.without.items():
        yield [f"│  without {' and '.join(other.inputs)}: {other.runs} in place of {graph}"], "", []
    for graph, at in loop.where.items():
        yield [f"│  where {at.column} is {at.value:g}: {at.runs} in place of {graph}"], "", []
    yield [f"└─ gives {_names(sorted(manifest.gives(node)))}"], "", []


def _step_reads(manifest: Manifest, loop: Loop, graph: str) -> list[str]:
    made = {port.name for table in loop.tables for port in manifest.graphs[table].outputs}
    ports = [port.name for port in manifest.graphs[graph].inputs]
    carried, cut = {*loop.carry.values()}, {*loop.slices}
    kinds = (
        ("what is carried", carried), ("earlier steps", loop.remembered), ("its row", {*loop.feeds}), ("tables", made),
        ("a part", cut),
    )  # fmt: skip
    ahead = {value for call in loop.ahead.get(graph, ()) for value in call.writes.values()}
    inner = {NOISE, *ahead}.union(*(names for _, names in kinds))
    values = [port for port in ports if port not in inner]
    told = [what for what, names in kinds if names & {*ports}] + ["noise"] * (NOISE in ports)
    return [", ".join([*told, _names(values)] if values else told)]


def _without_tokens(names: Iterable[str]) -> list[str]:
    """`prompt.input_ids` and `prompt.attention_mask` are the prompt."""
    return list(dict.fromkeys(name.removesuffix(".input_ids").removesuffix(".attention_mask") for name in names))


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed) if len(listed) <= _SHOWN else f"{len(listed)} values"


def _span(counts: Iterable[int]) -> str:
    ordered = sorted(counts)
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]}-{ordered[-1]}"
