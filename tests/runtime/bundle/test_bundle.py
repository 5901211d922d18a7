from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from motionrt.runtime.bundle.bundle import Bundle, Dim
from motionrt.runtime.errors import BundleError, InputError
from motionrt.runtime.files import sealed

Edit = Callable[..., Path]


def test_open_reads_what_was_written(fake_bundle: Path, fake: ModuleType) -> None:
    bundle = Bundle.open(str(fake_bundle))
    assert bundle.name == "fake" and bundle.path == fake_bundle
    assert set(bundle.graphs) == set(fake.GRAPHS)
    assert bundle.manifest.output.frames == fake.FRAMES and bundle.steps == ["step"]
    assert bundle.in_loop("step_plain") and not bundle.in_loop("decode")
    assert bundle.graph_path("step") == fake_bundle / "graphs" / "step.onnx"
    assert bundle.port("motion", "video").dims[0] == Dim("K", 1, 4, 8)
    assert str(bundle.port("motion", "video")) == "video: float32 [K 1-8, 3, 3, 16, 16]"
    assert bundle.port("step", "latents").shape == (1, *fake.LATENTS) and bundle.port("step", "latents").shared
    with pytest.raises(dataclasses.FrozenInstanceError):
        bundle.path = Path()  # type: ignore[misc]


@pytest.mark.parametrize(
    "name, steps, expected", [(None, None, ("ddim", 4)), ("dpm", 7, ("dpm", 7)), ("dpm", None, ("dpm", 4))], ids=str
)
def test_schedule_gives_rows(
    fake_bundle: Path, fake: ModuleType, name: str | None, steps: int | None, expected: tuple[str, int]
) -> None:
    schedule = Bundle.open(fake_bundle).schedule("video", name, steps)
    assert (schedule.name, schedule.steps) == expected
    np.testing.assert_array_equal(schedule.rows, fake.rows(*expected))
    assert not schedule.rows.flags.writeable  # shared by all requests


@pytest.mark.parametrize(
    "name, steps, message",
    [
        ("euler", 4, "solver is 'euler'; loop 'video' of this bundle has ddim, dpm"),
        ("ddim", 0, "steps is 0; solver 'ddim' of this bundle takes 1 to 10"),
        ("dpm", 1, "steps is 1; solver 'dpm' of this bundle takes 2 to 10"),
        ("ddim", 11, "steps is 11"),
        ("ddim", True, "steps is True"),
        ("ddim", 2.5, "steps is 2.5"),
    ],
    ids=str,
)
def test_schedule_refuses(fake_bundle: Path, name: str, steps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bundle.open(fake_bundle).schedule("video", name, steps)


def test_a_seal_shows_that_a_manifest_is_another(fake_bundle: Path, edit_bundle: Edit) -> None:
    assert "seal" not in json.loads((fake_bundle / "bundle.json").read_text()), "as versions before seals wrote it"
    path = edit_bundle(lambda manifest: manifest.update(sealed(manifest)))
    assert Bundle.open(path).name == "fake"
    text = (path / "bundle.json").read_text()
    (path / "bundle.json").write_text(text.replace('"name": "fake"', '"name": "fakf"'))
    with pytest.raises(BundleError, match="damaged, or was changed by hand.*remove `seal`"):
        Bundle.open(path)


def test_tokenize_pads_to_the_length_that_is_asked_for(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    text = bundle.tokenize("text", "a red ball", 6)
    np.testing.assert_array_equal(text["input_ids"], [[2, 4, 8, 0, 0, 0]])
    np.testing.assert_array_equal(text["attention_mask"], [[1, 1, 1, 0, 0, 0]])
    query = bundle.tokenize("text_query", "a red ball")
    np.testing.assert_array_equal(query["input_ids"], [[2, 4, 8]])
    assert query["input_ids"].dtype == np.int64
    assert bundle.tokenize("text_query", "", 1)["input_ids"].shape == (1, 1)


def test_tokenize_takes_the_limit_and_not_one_more(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    assert bundle.tokenize("text", "a " * 6)["input_ids"].shape == (1, 6)
    with pytest.raises(InputError, match="prompt is 7 tokens long; tokenizer 'text' of this bundle takes 6. Shorten"):
        bundle.tokenize("text", "a " * 7)


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"]], ids=repr)
def test_tokenize_refuses_what_is_no_string(fake_bundle: Path, text: Any) -> None:
    with pytest.raises(InputError, match="must be a string"):
        Bundle.open(fake_bundle).tokenize("text", text)


def test_tokenize_refuses_lone_surrogates(fake_bundle: Path) -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        Bundle.open(fake_bundle).tokenize("text", "a \ud800")


def test_names_that_are_not_there(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    with pytest.raises(BundleError, match="no graph 'x'; it has appearance, cama"):
        bundle.graph("x")
    with pytest.raises(BundleError, match="no port `x`"):
        bundle.port("step", "x")
    with pytest.raises(BundleError, match="no tokenizer 'x'"):
        bundle.tokenizer("x")


def test_open_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a directory"):
        Bundle.open(tmp_path / "missing")
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        Bundle.open(tmp_path)
    for data in (b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000):
        (tmp_path / "bundle.json").write_bytes(data)
        with pytest.raises(BundleError):
            Bundle.open(tmp_path)


@pytest.mark.parametrize("file", ["graphs/step.onnx", "tables.safetensors", "tokenizers/text.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_open_refuses_a_damaged_file(edit_bundle: Edit, file: str, damage: str) -> None:
    path = edit_bundle()
    data = bytearray((path / file).read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        (path / file).unlink()
    else:
        (path / file).write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(BundleError, match="cannot be read" if damage == "remove" else "is damaged"):
        Bundle.open(path)


def _graph(manifest: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = manifest["graphs"]["step"]
    return graph


def _loop(manifest: dict[str, Any]) -> dict[str, Any]:
    loop: dict[str, Any] = manifest["loops"]["video"]
    return loop


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=3), "has format 3; this version reads format 2 .*upgrade motionrt"),
        (lambda m: m.update(format=1), "has format 1; .*export it again"),
        (lambda m: m.update(format="2"), "has format 2; .*export it again"),
        (lambda m: m.update(format=True), "has format True"),
        (lambda m: m.update(extra=1), "unknown field `extra`"),
        (lambda m: m.pop("output"), "missing required field `output`"),
        (lambda m: m.update(output=3), "`output` is 3: Expected `object`"),
        (lambda m: m["output"].update(depth=1), "unknown field `depth`"),
        (lambda m: m["output"].update(frames=0), "`output.frames` is 0: Expected `int` >= 1"),
        (lambda m: m["output"].update(fps=0), "`output.fps` is 0: Expected `float` > 0"),
        (lambda m: m["memory"].update(default=9), "a request takes 9 clips and at most 8"),
        (lambda m: m["memory"].update(fingerprint="0"), "`memory.fingerprint` is '0'"),
        (lambda m: m["memory"]["record"][0].update(dtype="bfloat16"), "'motion' of the record is bfloat16"),
        (lambda m: m["memory"].update(text="words"), "searched by input 'words'"),
        (lambda m: m["memory"].update(graphs=["motion", "x"]), "the memory needs 'x', which is no graph"),
        (lambda m: _graph(m).update(file="../step.onnx"), "must lie inside"),
        (lambda m: _graph(m).update(file="/etc/passwd"), "must lie inside"),
        (lambda m: _graph(m).update(sha256="0" * 63), "graph 'step': `sha256` is '0+.*: Expected `str` matching"),
        (lambda m: _graph(m).update(sha256="0" * 64), "graph 'step' of the bundle is damaged"),
        (lambda m: _graph(m)["inputs"][0].update(dtype="float64"), "graph 'step': .*`latents` is float64; allowed: float32"),
        (lambda m: _graph(m).update(data={"file": "../w.safetensors", "sha256": "0" * 64}), "must lie inside"),
        (lambda m: _graph(m).update(data={"file": "w.safetensors"}), "graph 'step': .*missing required field `sha256`"),
        (lambda m: _graph(m)["inputs"][0].update(strides=1), "graph 'step': .*unknown field `strides`"),
        (lambda m: _graph(m)["inputs"][0].update(dims=[{"name": "B", "min": 2, "opt": 1, "max": 3}]), "min <= opt"),
        (lambda m: _graph(m)["inputs"][0].update(dims=[-1]), r"`inputs\[0\].dims\[0\]` is -1"),
        (lambda m: _graph(m).update(weights={"package": "os.path", "file": "x", "sha256": "0" * 64}), "is 'os.path'"),
        (lambda m: _loop(m).update(default=["euler", 4]), "the default schedule of loop 'video', euler with 4 steps, is not"),
        (lambda m: _loop(m)["schedules"].update(ddim=[0]), "loop 'video': .*Expected `int` >= 1"),
        (lambda m: _loop(m)["schedules"]["ddim"].append(11), r"holds no finite float32 \[11, 9\] 'video/ddim/11'"),
        (lambda m: _loop(m)["columns"].remove("c3"), "loop 'video' has no column 'c3'"),
        (lambda m: _loop(m).update(graphs=["stride"]), "loop 'video' runs 'stride', which is no graph"),
        (lambda m: m["plan"].append("dream"), "the plan runs 'dream', which is no graph and no loop"),
        (lambda m: m["plan"].remove("cama"), "'request' of the plan reads `motion`, which nothing before it gives"),
        (lambda m: m["plan"].remove("decode"), "nothing gives `video`, which is the video"),
        (lambda m: m["inputs"].pop("motion_scale"), "'request' of the plan reads `motion_scale`, which nothing"),
        (lambda m: m["inputs"]["image"].update(kind="picture"), "input 'image': .*picture"),
        (lambda m: m["inputs"]["prompt"].update(tokenizer="x"), "input 'prompt' is read by tokenizer 'x'"),
        (lambda m: m["inputs"]["guidance"].update(column="x"), "input 'guidance' changes column 'x' of loop 'video', which is"),
        (lambda m: m["inputs"]["guidance"].update(default=float("nan")), "NaN is no number"),
        (lambda m: m["tokenizers"]["text"].update(max_length=0), "tokenizer 'text': `max_length` is 0: Expected `int` >= 1"),
    ],
)
def test_open_refuses_a_manifest(edit_bundle: Edit, change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(edit_bundle(change))


@pytest.mark.parametrize("problem", ["nan", "shape", "dtype", "lost", "graph", "no safetensors"])
def test_open_refuses_tables(edit_bundle: Edit, fake: ModuleType, problem: str) -> None:
    path = edit_bundle()
    file, key = path / "tables.safetensors", "video/dpm/5"
    tables = load_file(file)
    if problem == "nan":
        tables[key][2, 3] = np.nan
    elif problem == "shape":
        tables[key] = tables[key][:4]
    elif problem == "dtype":
        tables[key] = tables[key].astype(np.float64)
    elif problem == "graph":
        tables[key][1, 0] = 1
    elif problem == "lost":
        del tables[key]
    save_file(tables, file)
    if problem == "no safetensors":
        file.write_bytes(b"\x80\x04pickle")
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["tables"]["sha256"] = fake.digest(file.read_bytes())
    (path / "bundle.json").write_text(json.dumps(manifest))
    said = {"graph": "names a graph that loop 'video' has not got", "no safetensors": "cannot be read"}
    with pytest.raises(BundleError, match=said.get(problem, r"no finite float32 \[5, 9\]")):
        Bundle.open(path)


def test_tokenizer_refuses_a_file_that_is_none(edit_bundle: Edit, fake: ModuleType) -> None:
    data = b"{}"
    path = edit_bundle(lambda m: m["tokenizers"]["text"].update(sha256=fake.digest(data)))
    (path / "tokenizers" / "text.json").write_bytes(data)
    with pytest.raises(BundleError, match="tokenizer file .* cannot be read"):
        Bundle.open(path).tokenizer("text")
