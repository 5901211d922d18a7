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

Edit = Callable[..., Path]


def test_open_reads_what_was_written(fake_bundle: Path, fake: ModuleType) -> None:
    bundle = Bundle.open(str(fake_bundle))
    assert bundle.name == "fake" and bundle.path == fake_bundle
    assert set(bundle.graphs) == set(fake.GRAPHS)
    assert bundle.model.latents == fake.LATENTS and bundle.model.motion_tokens == fake.TOKENS
    assert bundle.graph_path("step") == fake_bundle / "graphs" / "step.onnx"
    assert bundle.port("motion", "video").dims[0] == Dim("K", 1, 4, 8)
    assert str(bundle.port("motion", "video")) == "video: float32 [K 1-8, 3, 3, 16, 16]"
    assert bundle.digests["motion"] == bundle.graph("motion").sha256
    with pytest.raises(dataclasses.FrozenInstanceError):
        bundle.path = Path()  # type: ignore[misc]


@pytest.mark.parametrize("name, steps, expected", [(None, None, ("ddim", 4)), ("dpm", 7, ("dpm", 7))], ids=str)
def test_solver_gives_a_table(
    fake_bundle: Path, fake: ModuleType, name: str | None, steps: int | None, expected: tuple[str, int]
) -> None:
    solver = Bundle.open(fake_bundle).solver(name, steps)
    assert (solver.name, solver.steps) == expected
    tables = fake.solver_tables()
    np.testing.assert_array_equal(solver.timesteps, tables[f"{solver.name}/{solver.steps}/timesteps"])
    np.testing.assert_array_equal(solver.coefficients, tables[f"{solver.name}/{solver.steps}/coefficients"])
    assert not solver.coefficients.flags.writeable  # shared by all requests


@pytest.mark.parametrize(
    "name, steps, message",
    [
        ("euler", 4, "solver is 'euler'; this bundle has ddim, dpm"),
        ("ddim", 0, "steps is 0; solver 'ddim' of this bundle takes 1 to 10"),
        ("dpm", 1, "steps is 1; solver 'dpm' of this bundle takes 2 to 10"),
        ("ddim", 11, "steps is 11"),
        ("ddim", True, "steps is True"),
        ("ddim", 2.5, "steps is 2.5"),
    ],
    ids=str,
)
def test_solver_refuses(fake_bundle: Path, name: str, steps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bundle.open(fake_bundle).solver(name, steps)


def test_tokenize_pads_where_the_graph_has_a_fixed_length(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    text = bundle.tokenize("text", "a red ball")
    np.testing.assert_array_equal(text["input_ids"], [[2, 4, 8, 0, 0, 0]])
    np.testing.assert_array_equal(text["attention_mask"], [[1, 1, 1, 0, 0, 0]])
    query = bundle.tokenize("text_query", "a red ball")
    np.testing.assert_array_equal(query["input_ids"], [[2, 4, 8]])
    assert query["input_ids"].dtype == np.int64
    assert bundle.tokenize("text_query", "")["input_ids"].shape == (1, 1)  # the port's minimum


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


@pytest.mark.parametrize("file", ["graphs/step.onnx", "solvers.safetensors", "tokenizers/text.json"])
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


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=2), "has format 2; this version reads format 1 .*upgrade motionrt"),
        (lambda m: m.update(format=0), "has format 0; .*export it again"),
        (lambda m: m.update(format="1"), "'format' of the manifest is '1'"),
        (lambda m: m.update(format=True), "'format' of the manifest is True"),
        (lambda m: m.update(extra=1, more=2), "the manifest has the unknown keys 'extra', 'more'"),
        (lambda m: m.pop("model"), "the manifest lacks the key 'model'"),
        (lambda m: m.update(model=3), "'model' of the manifest is 3"),
        (lambda m: m["model"].update(depth=1), "'model' has the unknown key 'depth'"),
        (lambda m: m["model"].update(frames=0), "'frames' of 'model' is 0"),
        (lambda m: m["model"].update(fps=0), "'fps' of 'model'"),
        (lambda m: m["model"].update(latents=[1, 2, 3]), "must be 4 sizes"),
        (lambda m: m["model"].update(motion_tokens=[2, 2.5]), "must be 2 sizes"),
        (lambda m: m["model"].update(default_references=9), "is more than 'max_references'"),
        (lambda m: _graph(m).update(file="../step.onnx"), "must lie inside"),
        (lambda m: _graph(m).update(file="/etc/passwd"), "must lie inside"),
        (lambda m: _graph(m).update(sha256="0" * 63), "must be 64 hex digits"),
        (lambda m: _graph(m).update(sha256="0" * 64), "graph 'step' of the bundle is damaged"),
        (lambda m: _graph(m)["inputs"][0].update(dtype="float64"), "is float64; allowed: float32, int64, uint8"),
        (lambda m: _graph(m).update(data={"file": "../w.safetensors", "sha256": "0" * 64}), "must lie inside"),
        (lambda m: _graph(m).update(data={"file": "w.safetensors"}), "lacks the key 'sha256'"),
        (lambda m: m["defaults"].update(target_range="half"), "'target_range' is 'half'; allowed: correct, released"),
        (lambda m: _graph(m)["inputs"][0].update(strides=1), "a port of graph 'step' has the unknown key 'strides'"),
        (lambda m: _graph(m)["inputs"][0].update(dims=[{"name": "B", "min": 2, "opt": 1, "max": 3}]), "min <= opt"),
        (lambda m: _graph(m)["inputs"][0].update(dims=[-1]), "a dimension of port `latents`"),
        (lambda m: _graph(m).update(weights={"package": "os.path", "file": "x", "sha256": "0" * 64}), "no import name"),
        (lambda m: m["solvers"].update(default="euler"), "default solver 'euler'"),
        (lambda m: m["solvers"]["entries"]["ddim"].update(steps=[]), "must list step counts"),
        (lambda m: m["solvers"]["entries"]["ddim"]["steps"].append(11), "no finite int64"),
        (lambda m: m["tokenizers"]["text"].update(max_length=0), "'max_length' of tokenizer 'text' is 0"),
        (lambda m: m["defaults"].update(guidance=float("nan")), "guidance is nan"),
        (lambda m: m["digests"].pop("motion"), "lacks the key 'motion'"),
        (lambda m: m["digests"].update(other="0" * 64), "'digests' has the unknown key 'other'"),
    ],
)
def test_open_refuses_a_manifest(edit_bundle: Edit, change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(edit_bundle(change))


@pytest.mark.parametrize("problem", ["nan", "shape", "dtype", "lost", "no safetensors"])
def test_open_refuses_solver_tables(edit_bundle: Edit, fake: ModuleType, problem: str) -> None:
    path = edit_bundle()
    file, key = path / "solvers.safetensors", "dpm/5/coefficients"
    tables = load_file(file)
    if problem == "nan":
        tables[key][2, 3] = np.nan
    elif problem == "shape":
        tables[key] = tables[key][:4]
    elif problem == "dtype":
        tables[key] = tables[key].astype(np.float64)
    elif problem == "lost":
        del tables[key]
    save_file(tables, file)
    if problem == "no safetensors":
        file.write_bytes(b"\x80\x04pickle")
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["solvers"]["sha256"] = fake.digest(file.read_bytes())
    (path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="solver tables"):
        Bundle.open(path)


def test_tokenizer_refuses_a_file_that_is_none(edit_bundle: Edit, fake: ModuleType) -> None:
    data = b"{}"
    path = edit_bundle(lambda m: m["tokenizers"]["text"].update(sha256=fake.digest(data)))
    (path / "tokenizers" / "text.json").write_bytes(data)
    with pytest.raises(BundleError, match="tokenizer file .* cannot be read"):
        Bundle.open(path).tokenizer("text")
