"""Sidecars of engines: what is written is read, and everything that does not fit is refused in a sentence that names both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from by_path import load_by_path
from msgspec import structs

import motionrt
from motionrt.runtime.backends.tensorrt.engine_file import (
    EngineFile,
    EnginePort,
    Machine,
    Span,
    engine_folder,
    sorted_targets,
)  # fmt: skip
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import Dim, File, GraphSpec, Port, Weights
from motionrt.runtime.errors import EngineError, InputError
from motionrt.runtime.files import sha256_of

BATCH = Dim("batch", 1, 1, 4)
SPEC = GraphSpec(
    "step",
    "graphs/step.onnx",
    "a" * 64,
    (Port("latents", "float32", (BATCH, Dim("", 8, 8, 8))), Port("steps", "int64", (Dim("steps", 1, 8, 50),))),
    (Port("x0", "float32", (BATCH, Dim("", 8, 8, 8))),),
)
HERE = Machine("rtx", "1.7.1.116", "sm_89")
CONTENT = bytes(range(256)) * 16


@pytest.fixture
def file(tmp_path: Path) -> EngineFile:
    """A sidecar and its engine, both in place, that fit `SPEC` and `HERE`."""
    folder = engine_folder(tmp_path / "bundle", "rtx", ["sm_120", "sm_89"], "float16")
    folder.mkdir(parents=True)
    (folder / "step-0123456789ab.engine").write_bytes(CONTENT)
    made = EngineFile(
        folder=folder,
        file="step-0123456789ab.engine",
        flavor="rtx",
        library="1.7.1.116",
        motionrt=motionrt.__version__,
        graph="step",
        targets=("sm_89", "sm_120"),
        dtype="float16",
        onnx_sha256="a" * 64,
        weights_sha256="",
        built_from_sha256="b" * 64,
        recipe_sha256="c" * 64,
        profiles=(
            {"latents": Span((1, 8), (1, 8), (1, 8)), "steps": Span((8,), (8,), (8,))},
            {"latents": Span((1, 8), (2, 8), (4, 8)), "steps": Span((1,), (8,), (20,))},
        ),
        inputs=(EnginePort("latents", "float32", (-1, 8)), EnginePort("steps", "int64", (-1,))),
        outputs=(EnginePort("x0", "float32", (-1, 8)),),
        kernel="body",
        attentions=4,
        engine_sha256=sha256_of(folder / "step-0123456789ab.engine"),
        engine_bytes=len(CONTENT),
        build_seconds=1.5,
        peak_rss_mib=200.0,
    )
    (folder / "step.json").write_text(made.to_json())
    return made


def test_read_gives_what_was_written(file: EngineFile) -> None:
    assert EngineFile.read(file.folder / "step.json") == file
    assert json.loads(file.to_json())["format"] == 1


def test_a_sidecar_of_a_version_without_seals_is_read(file: EngineFile) -> None:
    path = file.folder / "step.json"
    path.write_text(_edit(lambda raw: raw.pop("seal"))(path.read_text()))
    assert EngineFile.read(path) == file


def test_check_accepts_what_fits(file: EngineFile) -> None:
    file.check(SPEC)
    file.check(SPEC, HERE)
    file.check(SPEC, replace(HERE, target="sm_120"))


def test_folder_names_flavor_targets_in_order_and_dtype() -> None:
    assert engine_folder(Path("b"), "rtx", ["sm_120", "sm_89"], "bfloat16") == Path("b/engines/rtx-sm_89+sm_120-bfloat16")


@pytest.mark.parametrize("target", ["89", "sm89", "sm_9", "sm_1200", "sm_8x", ""])
def test_sorted_targets_refuses_what_is_none(target: str) -> None:
    with pytest.raises(InputError, match="such as sm_89"):
        sorted_targets([target])


WRONG_SIDE: dict[str, tuple[dict[str, Any], GraphSpec, list[str]]] = {
    "another graph's ONNX": ({}, structs.replace(SPEC, sha256="d" * 64), ["aaaaaaaaaaaa", "dddddddddddd"]),
    "weights in a package": ({}, structs.replace(SPEC, weights=Weights("p", "f", "e" * 64)), ["none", "eeeeeeeeeeee"]),
    "weights beside the graph": ({}, structs.replace(SPEC, data=File("f", "e" * 64)), ["none", "eeeeeeeeeeee"]),
    "other weights beside it": (
        {"weights_sha256": "d" * 64}, structs.replace(SPEC, data=File("f", "e" * 64)), ["dddddd", "eeeeee"],
    ),
    "no weights any more": ({"weights_sha256": "d" * 64}, SPEC, ["dddddddddddd", "none"]),
    "another graph": ({"graph": "decode"}, SPEC, ["decode", "step"]),
    "older motionrt": ({"motionrt": "0.0.1"}, SPEC, ["0.0.1", motionrt.__version__]),
    "another input": ({"inputs": (EnginePort("x", "float32", (-1, 8)),)}, SPEC, ["x", "latents, steps"]),
    "another dtype": ({"outputs": (EnginePort("x0", "float16", (-1, 8)),)}, SPEC, ["x0: float16", "x0: float32"]),
    "another size": ({"outputs": (EnginePort("x0", "float32", (-1, 9)),)}, SPEC, ["[-1, 9]", "[batch 1-4, 8]"]),
    "another rank": ({"outputs": (EnginePort("x0", "float32", (8,)),)}, SPEC, ["[8]", "[batch 1-4, 8]"]),
}


@pytest.mark.parametrize("case", WRONG_SIDE)
def test_check_names_both_sides_of_a_bundle_that_does_not_fit(file: EngineFile, case: str) -> None:
    changes, spec, words = WRONG_SIDE[case]
    with pytest.raises(EngineError) as refused:
        structs.replace(file, **changes).check(spec)
    for word in [*words, f"motionrt build {file.folder.parent.parent} --target sm_89,sm_120 --flavor rtx --dtype float16"]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (replace(HERE, target="sm_90"), ["sm_89, sm_120", "this machine is sm_90", "--target sm_90"]),
        (replace(HERE, library="1.8.0.1"), ["TensorRT-RTX 1.7.1.116", "1.8.0.1"]),
        (replace(HERE, library="1.6.0.1"), ["TensorRT-RTX 1.7.1.116", "1.6.0.1"]),
        (replace(HERE, flavor="tensorrt", library="11.4"), ["is for TensorRT-RTX", "here TensorRT", "--flavor tensorrt"]),
    ],
    ids=["foreign GPU", "newer library", "older library", "another flavor"],
)
def test_check_names_both_sides_of_a_machine_that_does_not_fit(file: EngineFile, machine: Machine, words: list[str]) -> None:
    with pytest.raises(EngineError) as refused:
        file.check(SPEC, machine)
    for word in [*words, "ebuild: `motionrt build "]:
        assert word in str(refused.value)


def test_check_refuses_a_truncated_engine(file: EngineFile) -> None:
    file.engine_path.write_bytes(CONTENT[:-1])
    with pytest.raises(EngineError, match=f"has {len(CONTENT) - 1} bytes; its sidecar says {len(CONTENT)}.*Rebuild: "):
        file.check(SPEC, HERE)


@pytest.mark.parametrize("at", [0, len(CONTENT) // 2, len(CONTENT) - 1])
def test_check_refuses_one_flipped_bit(file: EngineFile, at: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[at] ^= 1
    file.engine_path.write_bytes(damaged)
    with pytest.raises(EngineError, match="is damaged: SHA-256.*nothing was loaded.*Rebuild: "):
        file.check(SPEC, HERE)


def test_check_refuses_a_missing_engine(file: EngineFile) -> None:
    file.engine_path.unlink()
    with pytest.raises(EngineError, match="cannot be read.*Rebuild: "):
        file.check(SPEC)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        raw = json.loads(text)
        change(raw)
        return json.dumps(raw)

    return edit


DAMAGED: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[:-20], "cannot be read"),
    "no object": (lambda text: "[]", "one object"),
    "newer format": (_edit(lambda raw: raw.update(format=2)), "format is 2; this version reads format 1"),
    "no format": (_edit(lambda raw: raw.pop("format")), "format is None"),
    "another value": (_edit(lambda raw: raw.update(library="9.9")), "damaged: it is not what its `seal` was made of"),
    "missing key": (_edit(lambda raw: raw.pop("library")), "missing required field `library`"),
    "unknown key": (_edit(lambda raw: raw.update(color=1)), "unknown field `color`"),
    "wrong type": (_edit(lambda raw: raw.update(engine_bytes="1")), r"Expected `int`, got `str` - at `\$.engine_bytes`"),
    "bool for int": (_edit(lambda raw: raw.update(attentions=True)), r"Expected `int`, got `bool` - at `\$.attentions`"),
    "no digest": (_edit(lambda raw: raw.update(engine_sha256="xyz")), r"\{64\}.* - at `\$.engine_sha256`"),
    "flavor": (_edit(lambda raw: raw.update(flavor="onnx")), "allowed: rtx, tensorrt"),
    "file elsewhere": (_edit(lambda raw: raw.update(file="../../x.engine")), r"engine.* - at `\$.file`"),
    "target": (_edit(lambda raw: raw.update(targets=["h100"])), "h100"),
    "profile": (_edit(lambda raw: raw["profiles"][0].update(latents={"min": [1]})), r"required field `opt` - at `\$.profiles"),
    "shape": (_edit(lambda raw: raw["inputs"][0].update(dims=[1.5])), r"got `float` - at `\$.inputs\[0\].dims\[0\]`"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_read_refuses_in_plain_words(file: EngineFile, case: str) -> None:
    path = file.folder / "step.json"
    damage, words = DAMAGED[case]
    path.write_text(damage(path.read_text()))
    with pytest.raises(EngineError, match=words) as refused:
        EngineFile.read(path)
    assert "Build it again with this version of motionrt: `motionrt build" in str(refused.value)


def test_read_of_nothing_says_how_to_build(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no engine .*motionrt build"):
        EngineFile.read(tmp_path / "bundle/engines/rtx-sm_89-float16/step.json")


@pytest.mark.parametrize(
    ("shapes", "index"),
    [({"latents": (1, 8), "steps": (8,)}, 0), ({"latents": (4, 8), "steps": (20,)}, 1), ({"latents": (3, 8)}, 1)],
)
def test_profile_for_takes_the_first_that_holds_all(file: EngineFile, shapes: dict[str, tuple[int, ...]], index: int) -> None:
    assert file.profile_for(shapes) == index


@pytest.mark.parametrize(
    "shapes", [{"latents": (5, 8)}, {"latents": (1, 8), "steps": (21,)}, {"latents": (8,)}, {"latents": (0, 8)}]
)
def test_profile_for_says_what_the_engine_takes(file: EngineFile, shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="this engine accepts .*; or .*--profile SIZE=MIN..MAX"):
        file.profile_for(shapes)


def test_an_engine_of_other_weights_is_refused_by_name(large_bundle: tuple[Path, Path, Path], fake: Any) -> None:
    bundle, beside, _ = large_bundle
    engine = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/fake_engine.py").write_engine(bundle, "decode")
    before = Bundle.open(bundle).graph("decode")
    engine.check(before)
    fake.move_weights(bundle, "decode", "w_decode", fake.constants()["w_decode"] + 1)
    after = Bundle.open(bundle).graph("decode")
    data = File(f"graphs/{beside.name}", sha256_of(beside))
    assert after == structs.replace(before, data=data), "the same graph, other weights"
    with pytest.raises(EngineError) as refused:
        engine.check(after)
    was, now = before.weights_sha256[:12], after.weights_sha256[:12]
    assert f"engine 'decode' in {engine.folder} was built from weights digest {was}; this bundle" in str(refused.value)
    assert f"have {now}. Rebuild: `motionrt build {bundle} --target sm_89" in str(refused.value)


def test_weights_of_a_graph_are_those_of_both_files() -> None:
    package, data = Weights("p", "f", "1" * 64), File("f", "2" * 64)
    other = structs.replace(package, sha256="3" * 64)
    both = {structs.replace(SPEC, weights=package, data=data), structs.replace(SPEC, weights=other, data=data)}
    some = {SPEC, structs.replace(SPEC, weights=package), structs.replace(SPEC, data=data)}
    assert {spec.weights_sha256 for spec in some} == {"", "1" * 64, "2" * 64}
    assert len({spec.weights_sha256 for spec in both | some}) == 5


def test_module_imports_only_what_the_run_side_has(tmp_path: Path) -> None:
    name = "motionrt.runtime.backends.tensorrt.engine_file"
    code = f"import sys, {name}; print(sorted(m for m in ('numpy','torch','onnx') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
