"""`motionrt verify`: reads everything, says everything that is wrong, and trusts no stamp."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from by_path import load_by_path

from motionrt.runtime import files as digests
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.files import STAMPS, sha256_of

Run = Callable[..., tuple[int, str, str]]
Large = tuple[Path, Path, Path]


@pytest.fixture
def complete(large_bundle: Large) -> Large:
    """A bundle with a file of each kind: weights of both kinds, a torch program, two engines."""
    path = large_bundle[0]
    manifest = json.loads((path / "bundle.json").read_text())
    step = manifest["graphs"]["step"]
    (path / "step.pt2").write_bytes(b"a program")
    ports = {kind: [port["name"] for port in step[kind]] for kind in ("inputs", "outputs")}
    step["program"] = {"file": "step.pt2", "sha256": sha256_of(path / "step.pt2"), "torch": "2.13", **ports}
    (path / "bundle.json").write_text(json.dumps(manifest))
    engine = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/fake_engine.py")
    for graph in ("step", "decode"):
        engine.write_engine(path, graph)
    return large_bundle


def test_verify_reads_every_file_and_counts(run: Run, complete: Large, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(digests, "_SETTLED", -(10**9))
    monkeypatch.setattr(digests, "sha256_of", lambda path: (read.append(str(path)), sha256_of(path))[1])
    path, _, inside = complete
    files = {file for file in path.rglob("*") if file.is_file() and file.suffix != ".json"} | {inside}
    files |= set(path.glob("tokenizers/*"))
    total = sum(file.stat().st_size for file in files)
    for _ in range(2):  # whatever the stamps of the first time say
        read.clear()
        status, out, err = run("verify", path)
        assert (status, err) == (0, "") and sorted(read) == sorted(map(str, files))
        assert out == (
            f"{path}: all sound: graphs 11, weights 2, tokenizers 2, tables of rows 1, programs 1, engines 2; "
            f"{total:,} bytes read.\n"
        )
    read.clear()
    Bundle.open(path).graph_path("decode")
    assert not read and len(json.loads((path / STAMPS).read_text())["files"]) == len(files)


DAMAGED = {
    "graphs/step.onnx": "graph 'step' of the bundle is damaged",
    "graphs/decode.safetensors": "the weights of graph 'decode' of the bundle is damaged",
    "../site/fake_minilm/model.safetensors": "is not the file that this bundle was exported with",
    "tokenizers/text.json": "tokenizer 'text' of the bundle is damaged",
    "tables.safetensors": "the tables of rows of the bundle is damaged",
    "step.pt2": "program 'step' of the bundle is damaged",
    "engines/rtx-sm_89+sm_120-float16/step-0123456789ab.engine": "engine 'step' in .* is damaged",
}


def test_verify_says_everything_that_is_wrong(run: Run, complete: Large, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of each file at once, and each has its own line; the stamps of the sound files vouch for none of them."""
    path = complete[0]
    stamp_of = digests.stamp_of
    monkeypatch.setattr(digests, "_SETTLED", -(10**9))
    monkeypatch.setattr(digests, "stamp_of", lambda file: (stamp_of(file)[0], 1, 2, 3))  # of a disk that changes by itself
    assert run("verify", path)[0] == 0
    for name in DAMAGED:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    Bundle.open(path)  # trusts the stamps
    status, out, err = run("verify", path)
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == len(DAMAGED) and all(line.startswith("motionrt: ") for line in lines)
    for words in DAMAGED.values():
        assert any(re.search(words, line) for line in lines), words
    status, _, err = run("inspect", path)  # and the stamps are no longer there
    assert status == 2 and "graph 'step' of the bundle is damaged" in err


def test_verify_names_what_is_missing(run: Run, complete: Large) -> None:
    path, beside, inside = complete
    beside.unlink()
    shutil.rmtree(inside.parent)
    next(path.glob("engines/*/decode-*.engine")).unlink()
    sidecar = next(path.glob("engines/*/step.json"))
    sidecar.rename(sidecar.with_name("other.json"))
    (sidecar.with_name("text.json")).write_text("{}")
    status, out, err = run("verify", path)
    assert (status, out) == (2, "")
    for words in (
        f"the weights of graph 'decode' of the bundle cannot be read: {beside}: No such file",
        "package fake_minilm, which is not installed: `pip install",
        "decode-0123456789ab.engine cannot be read",
        "engine 'other' in",
        "text.json: format is None",
    ):
        assert words in err
    assert len(err.splitlines()) == 5


def test_verify_refuses_engines_of_another_bundle(run: Run, complete: Large, fake: ModuleType) -> None:
    path = complete[0]
    fake.move_weights(path, "decode", "w_decode", fake.constants()["w_decode"] + 1)
    status, _, err = run("verify", path)
    assert status == 2 and len(err.splitlines()) == 1
    assert "engine 'decode' in" in err and "was built from weights digest" in err and "Rebuild: `motionrt build" in err


@pytest.mark.parametrize("content", [None, "{"], ids=["missing", "damaged"])
def test_verify_without_a_manifest_is_one_line(run: Run, complete: Large, content: str | None) -> None:
    manifest = complete[0] / "bundle.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    status, out, err = run("verify", complete[0])
    assert status == 2 and not out and len(err.splitlines()) == 1 and "bundle.json" in err


def test_verify_reads_what_the_tables_hold(run: Run, complete: Large) -> None:
    path = complete[0]
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["loops"]["video"]["schedules"]["ddim"].append(11)
    (path / "bundle.json").write_text(json.dumps(manifest))
    status, out, err = run("verify", path)
    assert status == 2 and not out and "holds no finite" in err and len(err.splitlines()) == 1
