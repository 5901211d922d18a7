"""A command as a process: Ctrl-C, encodings, control characters, pipes. None of them ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from motionrt.runtime.cli.terminal import visible

Run = Callable[..., tuple[int, str, str]]
ESCAPES = "a \x1b[31mred\x1b[2K \x1b]0;title\x07 \x9b1m \u202eball\r\nb"
# The command, in a process that gets Ctrl-C when the module that is named first is about to be imported.
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
wanted = sys.argv.pop(1)
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Watch())
from motionrt.__main__ import main
main()
"""


@pytest.fixture
def still(tmp_path: Path) -> Path:
    path = tmp_path / "still.png"
    Image.new("RGB", (20, 30), "red").save(path)
    return path


def process(*arguments: object, code: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -m motionrt` with `arguments`, or `code` with them; `more` is added to its environment."""
    start = ["-m", "motionrt"] if code is None else ["-c", code]
    command = [sys.executable, "-P", *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | more, errors="surrogateescape")


@pytest.mark.parametrize(
    "module",
    ["motionrt.runtime", "typer", "numpy", "motionrt.export.cli", "msgspec.json", "onnxruntime", "tokenizers", "av",
     "motionrt.runtime.media.video", "motionrt.runtime.pipeline", "rich.table"],
)  # fmt: skip
def test_interrupted_anywhere_it_is_one_line_and_130(fake_bundle: Path, still: Path, tmp_path: Path, module: str) -> None:
    asked = ["generate", "-b", fake_bundle, "-i", still, "-p", "a", "--motion-scale", 0, "-o", tmp_path / "out" / "a.mp4"]
    done = process(module, *asked, code=INTERRUPTED)
    assert (done.returncode, done.stderr, done.stdout) == (130, "motionrt: interrupted.\n", "")
    assert not list(tmp_path.rglob("*.partial"))


def test_interrupted_while_a_file_is_written_nothing_is_left(fake_bundle: Path, still: Path, tmp_path: Path) -> None:
    code = INTERRUPTED.replace(
        "from motionrt.__main__",
        "from motionrt.runtime.media import video\n"
        "video._write_mp4 = lambda path, *_: (path.write_bytes(b'half'), os.kill(os.getpid(), signal.SIGINT))\n"
        "from motionrt.__main__",
    )
    out = tmp_path / "out"
    asked = ["generate", "-b", fake_bundle, "-i", still, "-p", "a", "--motion-scale", 0, "-o", out / "a.mp4"]
    done = process("-", *asked, code=code)
    assert (done.returncode, done.stderr) == (130, "motionrt: interrupted.\n") and list(out.iterdir()) == []


def test_interrupted_without_standard_error(fake_bundle: Path, still: Path, tmp_path: Path) -> None:
    asked = ["generate", "-b", fake_bundle, "-i", still, "-p", "a", "--motion-scale", 0, "-o", tmp_path / "a.mp4"]
    for module in ("numpy", "onnxruntime"):
        done = process(module, *asked, code=f"import os; os.close(2)\n{INTERRUPTED}")
        assert (done.returncode, done.stdout) == (130, "")


def test_interrupted_in_the_background_it_goes_on() -> None:
    """A shell lets jobs behind an `&` ignore Ctrl-C; so do we."""
    code = INTERRUPTED.replace("signal.default_int_handler", "signal.SIG_IGN")
    assert process("typer", "--version", code=code).returncode == 0


MORE_ENCODINGS = [pytest.param(name, marks=pytest.mark.slow) for name in ("cp1252", "latin-1")]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", *MORE_ENCODINGS])
def test_output_in_any_encoding(fake_bundle: Path, still: Path, tmp_path: Path, encoding: str) -> None:
    out = tmp_path / "星é.gif"
    asked = ["-b", fake_bundle, "-i", still, "-p", "a", "--motion-scale", 0, "--steps", 1, "-o", out]
    done = process("generate", *asked, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and out.stat().st_size > 0 and done.stderr == ""
    assert ("星é" if encoding == "utf-8" else "\\u661f") in done.stdout
    done = process("inspect", fake_bundle, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "\\u" not in done.stdout and ("──▶" if encoding == "utf-8" else "-->") in done.stdout
    done = process("inspect", tmp_path / "é", PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    done = process("doctor", tmp_path / "é星", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout)["bundle"]["path"].endswith("é星")


def test_a_name_that_is_no_text_is_printed(tmp_path: Path) -> None:
    done = process("inspect", os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    assert done.returncode == 2 and "\\udcff\\udcfe" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every write fails")
def test_output_that_cannot_be_written_or_is_not_read(fake_bundle: Path) -> None:
    for target, status in (("> /dev/full", 2), ("| true", 1), (">&-", 0)):
        line = f'"{sys.executable}" -P -m motionrt inspect "{fake_bundle}" {target}; echo "${{PIPESTATUS[0]}}" >&2'
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        *said, got = done.stderr.splitlines()
        assert int(got) == status and len(said) == (status == 2) and "Traceback" not in done.stderr, done.stderr
    assert "No space left" in subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -P -m motionrt --version > /dev/full'], capture_output=True, text=True
    ).stderr  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space that holds")
@pytest.mark.parametrize("mebibytes", [300, 500, 600, 700, 800, 1000])
def test_little_memory_is_no_traceback_and_no_wrong_advice(
    fake_bundle: Path, fake_memory: Path, still: Path, tmp_path: Path, mebibytes: int
) -> None:
    """Wherever it ends: in an import, a graph or a library that ends the process itself, whose last words are its own."""
    line = f"ulimit -v {mebibytes * 1024}; exec \"$@\""
    asked = ["generate", "-b", fake_bundle, "-m", fake_memory, "-i", still, "-p", "a red ball", "-o", tmp_path / "a.mp4"]
    command = ["bash", "-c", line, "-", sys.executable, "-P", "-m", "motionrt", *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode >= 0:  # glibc's last words, where it cannot even load what unwinds a stack, are to install that
        assert "Traceback" not in done.stderr and "pgrade" not in done.stderr and "nstall" not in done.stderr, done.stderr
    assert done.returncode != 2 or "too little memory" in done.stderr, done.stderr
    assert not list(tmp_path.glob("*.partial")) and (tmp_path / "a.mp4").exists() == (done.returncode == 0)


def test_python_m_runs_the_command_from_anywhere(tmp_path: Path) -> None:
    import motionrt

    done = subprocess.run([sys.executable, "-m", "motionrt", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"motionrt {motionrt.__version__}\n", "")


def test_visible_writes_control_characters_out() -> None:
    assert visible(ESCAPES).isprintable() and visible(ESCAPES).startswith("a \\x1b[31mred\\x1b[2K \\x1b]0;title\\x07 \\x9b1m")
    assert visible("é 星 ─▶ [x] 👩\u200d🚀") == "é 星 ─▶ [x] 👩\u200d🚀"  # joiners of emoji and of scripts are no control


def test_captions_with_control_characters_do_not_reach_a_terminal(
    run: Run, fake_bundle: Path, fake_clips: dict[str, Path], still: Path, tmp_path: Path
) -> None:
    memory, out = tmp_path / "m", tmp_path / "\x1b[31m.gif"
    assert run("memory", "create", memory, "-b", fake_bundle)[0] == 0
    clip = next(iter(fake_clips.values()))
    assert run("memory", "add", memory, clip, "-b", fake_bundle, "--caption", ESCAPES, "--dataset", "\x1b[2J")[0] == 0
    for asked in (
        ("memory", "search", memory, "red", "-b", fake_bundle, "-k", 1),
        ("memory", "stats", memory),
        ("generate", "-b", fake_bundle, "-m", memory, "-i", still, "-p", "red", "-o", out),
        ("generate", "-b", fake_bundle, "-m", memory, "-i", "\x1b[31m.png", "-p", "red", "-o", out),
        ("verify", tmp_path / "\x1b[31m"),
        ("doctor", tmp_path / "\x1b[31m"),
    ):
        _, *streams = run(*asked)
        for stream in streams:
            assert all(character.isprintable() or character == "\n" for character in stream), (asked, stream)
        assert "\\x1b[" in "".join(streams)


def test_names_of_files_with_control_characters_do_not_reach_a_terminal(
    run: Run, fake_bundle: Path, fake_clips: dict[str, Path], tmp_path: Path
) -> None:
    """Of what is left out of a folder, of what fails, and of the folder, the memory and the list of failures themselves."""
    folder, memory = tmp_path / "\x1b[31mfolder", tmp_path / "\x9b1mm"
    folder.mkdir()
    for name in ("\x1b]0;title\x07.doc", "\u202enote.doc", "two\nlines.ts"):
        (folder / name).write_text("no video")
    (folder / "\x1b[2J.mp4").write_bytes(b"no video")
    clip = next(iter(fake_clips.values()))
    (folder / "good\r.mp4").write_bytes(clip.read_bytes())
    said = []
    for asked in (
        ("memory", "create", memory, "-b", fake_bundle),
        ("memory", "add", memory, folder, "-b", fake_bundle, "--caption", "a", "--dataset", "\x9b\x85", "--failed",
         tmp_path / "\x1b.csv"),
        ("memory", "verify", memory), ("memory", "compact", memory),
        ("memory", "stats", memory, "--json"),
    ):  # fmt: skip
        status, *streams = run(*asked)
        for stream in streams:
            assert all(character.isprintable() or character == "\n" for character in stream), (asked, stream)
        said.append("".join(streams))
    assert "left out, no video by its extension: " in said[1] and "\\x1b]0;title\\x07.doc" in said[1] and "1 added" in said[1]
    assert "\\u202enote.doc" in said[1] and "left out, text: " in said[1] and "two\\nlines.ts" in said[1]
    assert "\\x1b[2J.mp4 cannot be decoded" in said[1] and "(listed in " in said[1] and status == 0
    assert json.loads(said[-1])["datasets"] == {"\x9b\x85": 1}


def test_what_is_logged_is_a_line_of_the_command(tmp_path: Path) -> None:
    code = """
import logging
from motionrt.runtime.cli import main
from motionrt.runtime.cli.memory import memory_app
@memory_app.command("say")
def say() -> None:
    logging.getLogger("motionrt.runtime.memory").warning("searched without %s", "\\x1b[31m.mp4")
main.main(["memory", "say"])
"""
    done = process(code=code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "motionrt: searched without \\x1b[31m.mp4\n")


def test_a_fault_of_our_own_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, fake_bundle: Path) -> None:
    from motionrt.runtime.cli import picture

    def broken(*_: object) -> None:
        raise ZeroDivisionError("no words\nfor this")

    monkeypatch.setattr(picture, "picture", broken)
    status, out, err = run("inspect", fake_bundle)
    assert status == 1 and out == "" and err.count("\n") == 1 and "ZeroDivisionError: no words for this. This is a fault" in err
    monkeypatch.setenv("MOTIONRT_DEBUG", "1")
    from motionrt.runtime.cli.main import main

    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(fake_bundle)])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ImportError("av: failed to map segment from shared object"), OSError(12, "Cannot allocate memory")],
    ids=["memory", "import", "system"],
)
def test_too_little_memory_is_said(run: Run, monkeypatch: pytest.MonkeyPatch, fake_bundle: Path, error: Exception) -> None:
    from motionrt.runtime.cli import picture

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(picture, "picture", broken)
    status, _, err = run("inspect", fake_bundle)
    assert status == 2 and err.startswith("motionrt: too little memory. Free some") and err.count("\n") == 1
