"""Motion memories to damage, and all that can be asked of one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.benchmarks.harness import helper_module
from motionrt.benchmarks.reliability.bundles import SETTLED
from motionrt.benchmarks.reliability.damage import Subject
from motionrt.runtime.errors import MemoryStoreError
from motionrt.runtime.indexing.hashes import FileHashes
from motionrt.runtime.memory.memory import Clip, MotionMemory, Reference, Search

fake = helper_module("fake_memory")
TIMES = 20  # what vectors are longer here: a page holds a few of them
KEPT = {"embedding": TIMES * fake.E, "record": fake.RECORD, "fingerprint": "a" * 64}
LONG = np.tile(fake.query(), TIMES)
EXACT, INDEXED = 1000, 20  # clips up to which there is no index
WITHOUT = Search(without_damaged=True)
QUESTIONS: dict[str, Callable[[MotionMemory], Any]] = {
    "search": lambda m: m.search(LONG, 9),
    "dataset": lambda m: m.search(LONG, 5, Search(where={"dataset": "set1"})),
    "metadata": lambda m: m.search(LONG, 5, Search(where={"shade": ["1", "4"]}, exclude_source="video3.mp4")),
    "source": lambda m: m.search(LONG, 9, Search(exclude_source="video1.mp4")),
    "record": lambda m: m.search_record("motion", fake.clip(5).record["motion"], 4),
    "distinct": lambda m: m.search(LONG, 6, Search(distinct=0.9, diversity=0.3)),
    "words": lambda m: m.search(LONG, 9, Search(agreement=0), "caption 17, not left"),
    "agreeing": lambda m: m.search(LONG, 5, Search(where={"dataset": "set1"}), "the caption of clip 30"),
    "get": lambda m: m.get([3, 17, 30]),
    "ids": lambda m: m.ids().tolist(),
    "filter": lambda m: m.ids({"dataset": ["set0", "late"]}).tolist(),
    "len": len,
    "every": lambda m: m.search(LONG, 63),
    "without": lambda m: (m.search(LONG, 9, WITHOUT), set(m._told)),
    "verify": lambda m: _sound(m.verify()),
}


def _sound(problems: list[str]) -> bool:
    if problems:
        raise MemoryStoreError(problems[0])
    return True


def longer(number: int, **changes: Any) -> Clip:
    return fake.clip(number, embedding=np.tile(fake.clip(number).embedding, TIMES), **changes)  # type: ignore[no-any-return]


def made(path: Path, count: int = 60, **options: Any) -> Path:
    """A memory of several datasets and changes, with an index if its threshold says so."""
    with MotionMemory.create(path, **KEPT, **options) as memory:
        memory.add(longer(n, dataset=f"set{n % 3}", metadata={"shade": f"{n % 5}"}) for n in range(count))
        memory.add(longer(n, dataset="late") for n in range(count, count + 5))
        memory.remove([7, count + 2])
        memory.refresh()
    return path


def told(answer: Any) -> Any:
    """An answer as something that can be compared for equality."""
    if isinstance(answer, Reference):
        return [
            {name: array.tobytes() for name, array in field.items()} if field is answer.record else repr(field)
            for field in (getattr(answer, name) for name in answer.__dataclass_fields__)
        ]
    return [told(one) for one in answer] if isinstance(answer, (list, tuple)) else answer


def right(name: str, got: Any, want: Mapping[str, Any]) -> bool:
    """Whether an answer is the undamaged one; of a search without what is damaged, whether it is that of what it did not leave
    out, and said so."""
    if name != "without":
        return bool(got == want[name])
    found, left_out = got
    return bool(found == [one for one in want["every"] if one[0] not in set(map(repr, left_out))][:9])


def asked(path: Path, threshold: int, ask: Callable[[MotionMemory], Any]) -> Any:
    """The answer to a question, of a memory that is opened for it."""
    with MotionMemory.open(path, readonly=True, index_threshold=threshold) as memory:
        return told(ask(memory))


def damaged(folder: Path, threshold: int, pattern: str) -> Subject:
    """A memory whose files that fit `pattern` are damaged."""
    path = made(folder / "m", index_threshold=threshold)

    def tidy() -> None:
        for left in path.glob("memory.sqlite-*"):
            left.unlink()

    questions = {name: partial(asked, path, threshold, ask) for name, ask in QUESTIONS.items()}
    return Subject(sorted(path.glob(pattern)), questions, right=right, tidy=tidy)


def exported(folder: Path) -> Subject:
    """A memory as one file, which is imported."""
    file, path = folder / "m.mrtm", folder / "imported"
    with MotionMemory.open(made(folder / "m"), readonly=True) as memory:
        memory.export_file(file)

    def imported() -> Any:
        MotionMemory.import_file(file, path).close()
        return [asked(path, EXACT, QUESTIONS[name]) for name in ("every", "ids", "filter", "verify")]

    return Subject([file], {"import": imported}, tidy=lambda: shutil.rmtree(path, ignore_errors=True))


def journal(folder: Path) -> Subject:
    """What an indexing run that was cut short knew about its files (`resume.jsonl`)."""
    videos = [folder / f"{number}.mp4" for number in range(6)]
    for number, video in enumerate(videos):
        video.write_bytes(bytes([number]) * 100)
    time.sleep(SETTLED)
    file = folder / "resume.jsonl"
    hashes = FileHashes(file)
    for video in videos:
        hashes.sha256(video)
    hashes.save()

    def digests() -> list[str]:
        known = FileHashes(file)
        return [known.sha256(video) for video in videos]

    return Subject([file], {"digests": digests})


KINDS: dict[str, Callable[[Path], Subject]] = {
    "memory.sqlite": partial(damaged, threshold=EXACT, pattern="memory.sqlite"),
    "memory.sqlite with an index": partial(damaged, threshold=INDEXED, pattern="memory.sqlite"),
    "index": partial(damaged, threshold=INDEXED, pattern="index-*.usearch"),
    "index.json": partial(damaged, threshold=INDEXED, pattern="index.json"),
    "exported memory": exported,
    "resume.jsonl": journal,
}
