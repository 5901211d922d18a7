"""A file is hashed once, and again when it may have changed: in one process, in the next one, and in two at once."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime import files as digests
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BundleError
from motionrt.runtime.files import STAMPS, digest_of, is_sealed, replacing, replacing_folder, sealed, sha256_of


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed. Here a file counts as settled as soon as it is written."""
    names: list[str] = []
    monkeypatch.setattr(digests, "_SETTLED", -(10**9))
    monkeypatch.setattr(digests, "sha256_of", lambda path: (names.append(path.name), sha256_of(path))[1])
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in a folder of a bundle, whose own folder is `tmp_path / "home"`."""
    path = tmp_path / "home/graphs/weights"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"one")
    time.sleep(0.02)  # what a test writes next has another time, however coarse the clock of the file system
    return path


def next_process() -> None:
    digests._known.clear()


def stamps(home: Path) -> set[str]:
    return set(json.loads((home / STAMPS).read_text())["files"])


def test_a_file_is_read_once_in_this_process_and_the_next(file: Path, read: list[str]) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    assert digest_of(file, sha256, home) == digest_of(file, sha256, home) == sha256
    next_process()
    assert digest_of(file, sha256, home) == sha256
    assert read == ["weights"] and stamps(home) == {"graphs/weights"}
    assert digest_of(file, sha256, home, read=True) == sha256
    assert read == ["weights"] * 2


@pytest.mark.parametrize("content", [b"two", b"one", b"one "], ids=["other bytes", "the same bytes", "more bytes"])
@pytest.mark.parametrize("how", ["written", "written, with the old time", "replaced, with the old time"])
def test_a_file_that_may_have_changed_is_read(file: Path, read: list[str], content: bytes, how: str) -> None:
    home, sha256, before = file.parent.parent, sha256_of(file), file.stat()
    digest_of(file, sha256, home)
    target = file.with_name("new") if how.startswith("replaced") else file
    target.write_bytes(content)
    if how != "written":
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(target, file)
    sound = content == b"one"
    for reads in (2, 2 if sound else 3):  # what is not as expected is vouched for by no stamp
        assert digest_of(file, sha256, home) == sha256_of(file)
        assert read == ["weights"] * reads and stamps(home) == ({"graphs/weights"} if sound else set())
        next_process()


def test_a_file_that_was_just_written_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    monkeypatch.setattr(digests, "_SETTLED", 2 * 10**9)
    for _ in range(2):
        digest_of(file, sha256, home)
    assert read == ["weights"] * 2 and not (home / STAMPS).exists()
    now = digests.time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 3 * 10**9)
    for _ in range(2):
        digest_of(file, sha256, home)
    assert read == ["weights"] * 3


def test_a_file_that_changes_while_it_is_read_is_read_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    counted = digests.sha256_of
    monkeypatch.setattr(digests, "sha256_of", lambda path: (counted(path), file.write_bytes(b"two"))[0])
    assert digest_of(file, sha256, home) == sha256
    assert digest_of(file, sha256, home) != sha256


@pytest.mark.parametrize("process", ["the same process", "the next process"])
def test_a_stamp_of_another_digest_is_not_trusted(file: Path, read: list[str], process: str) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    digest_of(file, sha256, home)
    if process == "the next process":
        next_process()
    assert digest_of(file, "0" * 64, home) == sha256  # what another bundle.json declares for the same file
    assert read == ["weights"] * 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"format": 1}', '{"format": 1, "files": []}', '{"format": 2, "files": {}}', "\0",
     '{"format": 1, "files": {"graphs/weights": null, "\\u0000": 3}}'],
)  # fmt: skip
def test_damaged_stamps_are_ignored_and_made_again(file: Path, read: list[str], text: str) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    (home / STAMPS).write_text(text)
    assert digest_of(file, sha256, home) == sha256
    next_process()
    assert digest_of(file, sha256, home) == sha256
    assert read == ["weights"] and stamps(home) == {"graphs/weights"}


def test_where_nothing_can_be_stored_each_process_reads_once(file: Path, read: list[str]) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    (home / STAMPS).mkdir()  # nothing can take its place, whoever asks (the tests may run as root, who ignores permissions)
    for process in (1, 2):
        for _ in range(2):
            assert digest_of(file, sha256, home) == sha256
        assert read == ["weights"] * process
        next_process()
    assert sorted(path.name for path in home.iterdir()) == [STAMPS, "graphs"]


def test_stamps_go_with_a_bundle_that_is_moved_and_not_with_a_copy(file: Path, read: list[str]) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    outside = home.with_name("package")
    outside.write_bytes(b"one")
    digest_of(file, sha256, home)
    digest_of(outside, sha256, home)
    moved, copy = home.rename(home.with_name("moved")), home.with_name("copy")
    shutil.copytree(moved, copy)
    assert digest_of(moved / "graphs/weights", sha256, moved) == digest_of(outside, sha256, moved) == sha256
    assert read == ["weights", "package"]
    assert digest_of(copy / "graphs/weights", sha256, copy) == sha256
    assert read == ["weights", "package", "weights"]


def test_stamps_of_files_that_are_gone_go(file: Path, read: list[str]) -> None:
    home, sha256 = file.parent.parent, sha256_of(file)
    other = file.with_name("other")
    other.write_bytes(b"one")
    digest_of(other, sha256, home)
    other.unlink()
    digest_of(file, sha256, home)
    assert stamps(home) == {"graphs/weights"}
    with pytest.raises(FileNotFoundError):
        digest_of(other, sha256, home)


def test_threads_that_want_one_file_read_it_once(file: Path, read: list[str]) -> None:
    home, sha256, got = file.parent.parent, sha256_of(file), list[str]()
    threads = [threading.Thread(target=lambda: got.append(digest_of(file, sha256, home))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [sha256] * 8 and read == ["weights"]


HAMMER = """
import sys
from pathlib import Path
from motionrt.runtime import files as digests
digests._SETTLED = -10**9
home, which = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(150):
    digests._known.clear()
    path = home / f"{which}{turn % 5}"
    assert digests.digest_of(path, sys.argv[3], home, read=turn % 3 == 0) == sys.argv[3]
"""


def test_two_processes_may_write_stamps_at_once(tmp_path: Path) -> None:
    """What is there at any time can be read whole, and holds nothing false."""
    for name in (f"{which}{number}" for which in "ab" for number in range(5)):
        (tmp_path / name).write_bytes(b"one")
    sha256 = sha256_of(tmp_path / "a0")
    command = [sys.executable, "-P", "-c", HAMMER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*command, which, sha256], **pipes) for which in "ab"]  # type: ignore[call-overload]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    running = True
    while running:
        running = any(child.poll() is None for child in children)  # looked at once more after they have ended
        if (tmp_path / STAMPS).exists():
            for name, entry in json.loads((tmp_path / STAMPS).read_text())["files"].items():
                assert entry == [*digests.stamp_of(tmp_path / name), sha256]
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0, 0] and stamps(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


# A bundle with weights beside a graph and in a package


REQUESTS = """
import hashlib, json, os, sys
from pathlib import Path
from motionrt.runtime import files as digests
from motionrt.runtime.cli import diagnosis as doctor
from motionrt.runtime.pipeline import MotionPipeline
digests._SETTLED = 0
read, real = [], hashlib.file_digest
hashlib.file_digest = lambda file, kind: (read.append([file.name, os.fstat(file.fileno()).st_size]), real(file, kind))[1]
bundle, memory, image = sys.argv[1:4]
with MotionPipeline.from_bundle(bundle, memory, threads=1, low_memory=True) as pipeline:
    for turn in range(2):
        pipeline(image, "a red ball moves right", steps=2)
        print(json.dumps(read))
        read.clear()
doctor.examine(Path(bundle))
print(json.dumps(read))
"""


def test_low_memory_hashes_nothing_twice(
    large_bundle: tuple[Path, Path, Path], fake_memory: Path, still: NDArray[np.uint8]
) -> None:
    """Two requests in one process, `doctor` after them, and all of it again in another process: every file is read once."""
    bundle, beside, inside = large_bundle
    Image.fromarray(still).save(bundle.parent / "still.png")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-c", REQUESTS, str(bundle), str(fake_memory), str(bundle.parent / "still.png")]

    def process() -> list[list[tuple[str, int]]]:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return [[(name, size) for name, size in json.loads(line)] for line in done.stdout.splitlines()]

    files = [*bundle.glob("graphs/*"), *bundle.glob("tokenizers/*"), bundle / "tables.safetensors", inside]
    assert beside in files
    first, *rest = process()
    assert sorted(first) == sorted((str(path), path.stat().st_size) for path in files)
    assert rest == [[], []]
    assert process() == [[], [], []]
    beside.write_bytes(beside.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="the weights of graph 'decode' of the bundle is damaged"):
        Bundle.open(bundle).graph_path("decode")


# --- files and folders that appear whole or not at all ----------------------------------------------------------------


def test_replacing_gives_the_whole_file_or_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/file"
    with replacing(path, BundleError) as temporary:
        temporary.write_text("one")
        assert not path.exists() and temporary.parent == path.parent
    with pytest.raises(ZeroDivisionError), replacing(path, BundleError) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "one" and [item.name for item in path.parent.iterdir()] == ["file"]
    full = OSError(errno.ENOSPC, "No space left on device")
    message = r"cannot write .*file: No space left.*Nothing was written. Free space on the disk, or"
    with pytest.raises(BundleError, match=message):
        with replacing(path, BundleError):
            raise full
    with pytest.raises(BundleError, match="Check the folder and its permissions"), replacing(path / "below", BundleError):
        pass


def test_replacing_folder_gives_the_whole_folder_or_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "above/bundle"
    for text in ("one", "two"):
        with replacing_folder(path) as folder:
            (folder / text).write_text(text)
    with pytest.raises(ZeroDivisionError), replacing_folder(path) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert [item.name for item in path.iterdir()] == ["two"], "nothing of the folder before stays"
    assert [item.name for item in path.parent.iterdir()] == ["bundle"]


def test_a_folder_whose_process_was_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    path, old = tmp_path / "bundle", tmp_path / "bundle.old"
    old.mkdir()
    (old / "one").touch()
    with pytest.raises(ZeroDivisionError), replacing_folder(path):
        raise ZeroDivisionError
    assert [item.name for item in path.iterdir()] == ["one"] and not old.exists()


def test_a_seal_is_of_all_else_and_of_no_layout() -> None:
    record = sealed({"one": 1, "more": {"b": [1.5, None], "a": "\ud800"}})
    assert is_sealed(record) and sealed(record) == record
    assert is_sealed(json.loads(json.dumps(dict(reversed(record.items())), indent=3)))
    changes: list[dict[str, object]] = [{"one": 2}, {"one": True}, {"two": 2}, {"more": {}}, {"seal": "0" * 64}]
    assert not any(is_sealed(record | change) for change in changes)
    assert not is_sealed({"one": 1})


def test_module_imports_only_the_standard_library(tmp_path: Path) -> None:
    code = "import sys, motionrt.runtime.files; print(sorted({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    names = {name for name in ast.literal_eval(done.stdout) if not name.startswith(("_", "sitecustomize"))}
    assert names <= {"motionrt"}, done.stderr
