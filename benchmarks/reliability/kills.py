"""Commands that are killed at a random moment: what was there before is there and sound, nothing half-written is taken for a
whole, and the same command again works."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.benchmarks.harness import ROOT
from motionrt.benchmarks.reliability.bundles import DEMO, command, copied
from motionrt.benchmarks.reliability.memories import made, told
from motionrt.benchmarks.reliability.tries import Found
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.files import sha256_of
from motionrt.runtime.indexing.clips import BATCH, ClipEncoders, index_clips
from motionrt.runtime.indexing.sources import open_sources
from motionrt.runtime.memory.memory import MotionMemory

MOTIONRT = [sys.executable, "-m", "motionrt"]
CLIPS = sorted((ROOT / "demo/clips").glob("*.mp4"))[: 6 * BATCH]
CAPTIONS = ROOT / "demo/clips/captions.json"
LARGE, SMALL = 5_600, 4_900  # clips: more than are searched without an index, and fewer
OURS = os.environ | {"PYTHONPATH": str(ROOT / "src")}  # of a child process, whatever is installed beside it
EARLY = 0.25  # of the kills fall anywhere, the others into the part in which files change


class Lost(Exception):
    """What was there before is not, or not whole."""


@dataclass(frozen=True)
class Command:
    """A command that changes a folder. start: what is there before; line: the command.

    kept: what must be there after a kill as before, compared for equality, or `Lost`; whole: what there is once it is done.
    """

    start: Callable[[Path], object]
    line: Callable[[Path], list[str]]
    kept: Callable[[Path], Any]
    whole: Callable[[Path], Any]


def run(kind: str, kills: int, first: int = 0) -> Found:
    """Kill the command `kills` times, with the numbers from `first` on; those that were done before are counted as such."""
    job, found = COMMANDS[kind], Found()
    with tempfile.TemporaryDirectory(prefix="motionrt-kills-") as name:
        start, place = Path(name, "start"), Path(name, "place")
        start.mkdir()
        job.start(start)
        kept = job.kept(start)
        work, end = _measured(job, start, place)
        whole, number, began = job.whole(place), first, time.perf_counter()
        while found.outcomes["killed"] < kills and number < first + 10 * kills:
            draw = random.Random(f"{kind} {number}")
            moment = draw.uniform(0 if draw.random() < EARLY else work, end)
            _copy(start, place)
            try:
                took = _killed(job.line(place), place, moment)
                _check(job, place, kept, whole)
                found.add(number, "killed" if took is None else "done before", "")
                if took is not None:  # the machine has become faster since it was measured
                    work, end = work * min(1.0, took / end), min(took, end)
            except Exception as error:  # of any kind: a raw one from what is asked of the folder counts too
                found.add(number, "wrong", f"after {moment:.2f} s: {type(error).__name__}: {error}"[:500])
            number += 1
        found.seconds = time.perf_counter() - began
    return found


def _check(job: Command, place: Path, kept: Any, whole: Any) -> None:
    if job.kept(place) != kept:
        raise Lost("what was there before is another now")
    with suppress(Exception):
        if job.whole(place) == whole:  # it was done but for its last words; another time it may say that it was
            return
    again = subprocess.run(job.line(place), cwd=place, env=OURS, capture_output=True, text=True, check=False)
    if again.returncode:
        raise Lost(f"the same command again: {again.stderr.strip()[-300:]}")
    if job.whole(place) != whole:
        raise Lost("the same command again gives something else")


def _measured(job: Command, start: Path, place: Path) -> tuple[float, float]:
    """Seconds until the command first changes a file, and until it is done; `place` is then what it makes of `start`."""
    _copy(start, place)
    began = time.perf_counter()
    subprocess.run(job.line(place), cwd=place, env=OURS, capture_output=True, check=False)
    end = time.perf_counter() - began  # of a run that nobody watches
    _copy(start, place)
    before, work, began = _stamps(place), 0.0, time.perf_counter()
    with subprocess.Popen(job.line(place), cwd=place, env=OURS, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            if not work and _stamps(place) != before:
                work = time.perf_counter() - began
            time.sleep(0.002)
        assert process.stderr is not None
        if process.returncode:
            raise RuntimeError(f"{job.line(place)}: {process.stderr.read().decode()}")
    return min(work, 0.9 * end), end


def _stamps(folder: Path) -> list[tuple[str, int]]:
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            found.append((str(path), path.stat().st_mtime_ns))
    return found


def _copy(start: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(start, place)


def _killed(line: list[str], place: Path, moment: float) -> float | None:
    """Run a command and kill it, with all that it started, after `moment` seconds; if it was done before: its seconds."""
    quiet, began = subprocess.DEVNULL, time.perf_counter()
    with subprocess.Popen(line, cwd=place, env=OURS, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            process.wait(moment)
            return time.perf_counter() - began
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None


def _memory(path: Path) -> tuple[list[int], Any]:
    """Ids and clips of a memory that is sound."""
    with MotionMemory.open(path, readonly=True) as memory:
        if problems := memory.verify():
            raise Lost(problems[0])
        ids = memory.ids().tolist()
        return ids, [told(one) for one in memory.get(ids)]


# --- memory add -----------------------------------------------------------------------------------------------------------


def _some_clips(folder: Path) -> None:
    bundle = Bundle.open(DEMO)
    with MotionMemory.for_bundle(folder / "m", bundle) as memory:
        source = open_sources(CLIPS[:BATCH], captions=CAPTIONS)
        index_clips(memory, ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1)), source.items())


def _first_batch(folder: Path) -> Any:
    ids, clips = _memory(folder / "m")
    if len(ids) % BATCH:
        raise Lost(f"{len(ids)} clips are there: a part of a batch")
    return clips[:BATCH]


# --- memory compact, memory import ----------------------------------------------------------------------------------------


def _many_clips(folder: Path) -> None:
    made(folder / "m", LARGE)
    with MotionMemory.open(folder / "m") as memory:
        memory.remove(range(100, 500))


def _suffixes(folder: Path) -> list[str]:
    """Of the files of a memory, each once: what a killed one left beside them is removed after an hour."""
    return sorted(file.suffix for file in folder.iterdir() if file.name[0] != ".")


def _one_file(folder: Path) -> None:
    with MotionMemory.open(made(folder / "m", SMALL), readonly=True) as memory:
        memory.export_file(folder / "m.mrtm")
    shutil.rmtree(folder / "m")


def _nothing_or_all(folder: Path) -> bool:
    if (folder / "m" / "memory.sqlite").exists():
        _memory(folder / "m")
    return True


# --- build, export --------------------------------------------------------------------------------------------------------


def _built(folder: Path) -> set[str]:
    """The files of engines, but for what a name or a file says of one build: digests, seconds."""
    command("verify", folder / "bundle")
    files = [file for file in (folder / "bundle" / "engines").glob("*/*") if not file.name.startswith(".")]
    return {f"{file.parent.name}/{file.name.split('-')[0]}{file.suffix}" for file in files}


def _sound(folder: Path) -> bool:
    command("verify", folder / "bundle")
    return True


def _exported(folder: Path) -> dict[str, str]:
    bundle = folder / "bundle"
    command("verify", bundle)
    files = [file for file in bundle.rglob("*") if file.is_file() and file.name[0] != "."]
    return {str(file.relative_to(bundle)): sha256_of(file) for file in files}


def _export(folder: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tests/helpers/toy_system.py"), str(folder / "bundle")]


def _old_bundle(folder: Path) -> None:
    subprocess.run(_export(folder), env=OURS, check=True, capture_output=True)


def _old_or_new(folder: Path) -> bool:
    """Between its two renames an export leaves the old bundle under another name, where the next one finds it."""
    old = folder / "bundle.old"
    command("verify", old if old.exists() and not (folder / "bundle").exists() else folder / "bundle")
    return True


def _build(*options: str) -> Command:
    return Command(copied, lambda folder: [*MOTIONRT, "build", str(folder / "bundle"), *options], _sound, _built)


COMMANDS = {
    "memory add": Command(
        _some_clips,
        lambda folder: [*MOTIONRT, "memory", "add", "m", *map(str, CLIPS), "-b", str(DEMO), "--captions", str(CAPTIONS)],
        _first_batch,
        lambda folder: _memory(folder / "m"),
    ),
    "memory compact": Command(
        _many_clips, lambda folder: [*MOTIONRT, "memory", "compact", "m"], lambda folder: _memory(folder / "m"),
        lambda folder: (_memory(folder / "m"), _suffixes(folder / "m")),
    ),
    "memory import": Command(
        _one_file, lambda folder: [*MOTIONRT, "memory", "import", "m.mrtm", "m"], _nothing_or_all,
        lambda folder: _memory(folder / "m"),
    ),
    "build": _build("--target", "sm_89", "--graphs", "text,encode,appearance,motion"),
    "build for ONNX Runtime": _build("--flavor", "onnxruntime", "--dtype", "float16"),
    "export": Command(_old_bundle, _export, _old_or_new, _exported),
}  # fmt: skip
# Of a long run; what was done before it was killed does not count.
KILLS = {"memory add": 50, "memory compact": 50, "memory import": 40, "build": 25, "build for ONNX Runtime": 15, "export": 20}
