"""The shapes that an engine is built for, from the sizes that a bundle declares and those that its user asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from motionrt.runtime.backends.tensorrt.engine_file import Profile, Span
from motionrt.runtime.bundle.manifest import Dim, GraphSpec
from motionrt.runtime.errors import InputError

BATCH = "batch"  # the one size that a deployment chooses once; others follow the request
Sizes = Mapping[str, tuple[int, int, int]]


def profiles_of(spec: GraphSpec, extra: Sequence[Sizes] = ()) -> tuple[Profile, ...]:
    """The profiles of a graph, each once: static at every declared `opt`, what requests vary, then `extra`.

    A graph whose sizes change from request to request (tokens of a prompt, references) gets a second profile over their
    declared range at the `opt` of the batch: no request would fit otherwise. All others, the loop's among them, are static.
    `extra` names sizes with (min, opt, max); sizes that it does not name stay at `opt`, graphs that have none of them too.
    """
    sizes = _sizes([spec])
    asked: list[Sizes] = [{}]
    if varying := {name: (d.min, d.opt, d.max) for name, d in sizes.items() if name != BATCH}:
        asked.append(varying)
    for wanted in extra:
        mine = {name: span for name, span in wanted.items() if name in sizes}
        for name, (low, opt, high) in mine.items():
            dim = sizes[name]
            if not dim.min <= low <= opt <= high <= dim.max:
                raise InputError(
                    f"--profile {name}={low}..{opt}..{high}: graph '{spec.name}' declares {name} {dim.min} to {dim.max}. "
                    "Stay inside, or export a bundle with other sizes."
                )
        if mine:
            asked.append(mine)
    made: list[Profile] = []
    for named in asked:
        profile = {port.name: _span(port.dims, named) for port in spec.inputs}
        if profile not in made:
            made.append(profile)
    return tuple(made)


def parse_profile(text: str) -> Sizes:
    """`batch=1..4`, `batch=2`, `batch=1..2..4` (least, tuned for, most), several with commas; `InputError` otherwise."""
    sizes = {}
    for part in text.split(","):
        match = re.fullmatch(r"([A-Za-z_]\w*)=(\d+)(?:\.\.(\d+))?(?:\.\.(\d+))?", part.strip())
        if match is None:
            raise InputError(f"--profile is {text!r}; allowed is SIZE=MIN..MAX or SIZE=MIN..OPT..MAX, such as batch=1..4.")
        numbers = [int(number) for number in match.groups()[1:] if number is not None]
        low, high = numbers[0], numbers[-1]
        opt = numbers[1] if len(numbers) == 3 else high
        if not 0 < low <= opt <= high:
            raise InputError(f"--profile is {text!r}; it must have 0 < MIN <= OPT <= MAX.")
        sizes[match[1]] = (low, opt, high)
    return sizes


def check_names(profiles: Sequence[Sizes], specs: Sequence[GraphSpec]) -> None:
    """`InputError` for a size that no graph has: a typing error must not build an engine that nobody asked for."""
    known = _sizes(specs)
    for name in (name for sizes in profiles for name in sizes if name not in known):
        raise InputError(f"--profile names {name!r}; the sizes of these graphs are {', '.join(sorted(known)) or 'all fixed'}.")


def _sizes(specs: Sequence[GraphSpec]) -> dict[str, Dim]:
    """The sizes that are not fixed in the inputs of graphs, by name, with their ranges."""
    found = {}
    for dim in (dim for spec in specs for port in spec.inputs for dim in port.dims if dim.min != dim.max):
        name, times = _split(dim.name)
        found[name] = Dim(name, dim.min // times, dim.opt // times, dim.max // times)
    return found


def _split(name: str) -> tuple[str, int]:
    """`2*batch` is twice the size `batch`."""
    factor, star, base = name.rpartition("*")
    return base, int(factor) if star else 1


def _span(dims: Sequence[Dim], named: Sizes) -> Span:
    sides = []
    for dim in dims:
        name, times = _split(dim.name)
        moving = dim.min != dim.max and name in named
        sides.append(tuple(times * size for size in named[name]) if moving else (dim.opt,) * 3)
    return Span(*(tuple(side[index] for side in sides) for index in range(3)))
