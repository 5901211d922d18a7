"""Several motion memories searched as one: a domain is a memory, and taking one in or out costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import instance, listed, real, text_of
from motionrt.runtime.errors import InputError, shown
from motionrt.runtime.memory.memory import MotionMemory, Reference
from motionrt.runtime.memory.ranking import Found, Ranked, Searchable, pick, relevance
from motionrt.runtime.memory.search import Search


class MemorySet(Searchable):
    """Open memories by name, ordered together by score times weight, which is the references' score.

    `minimum_score` is compared with the cosine itself; `distinct` and `diversity` count across memories. The memories stay
    their owner's: one may be in several sets. `close` closes them all.
    """

    def __init__(self, memories: Mapping[str, MotionMemory], weights: Mapping[str, float] | None = None) -> None:
        instance("memories", memories, Mapping, "a mapping from names to open motion memories")
        for name, memory in memories.items():
            text_of("the name of a motion memory", name)
            instance(f"the motion memory {name!r}", memory, MotionMemory, "an open MotionMemory")
        if weights is not None:
            instance("weights", weights, Mapping, "a mapping from names of the set to numbers, or None")
        self.memories = dict(memories)
        self.weights = dict.fromkeys(self.memories, 1.0) | dict(weights or {})
        good = all(name in self.memories and (real(weight) or 0) > 0 for name, weight in self.weights.items())
        if not good or not self.memories:
            raise InputError(
                f"the weights of a set of memories {sorted(self.memories)} are {shown(weights)}; allowed are finite"
                " numbers above 0, for names of the set, which has at least one memory."
            )

    def __enter__(self) -> MemorySet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return sum(len(memory) for memory in self.memories.values())

    def close(self) -> None:
        """Close every memory."""
        for memory in self.memories.values():
            memory.close()

    def check(self, fingerprint: str) -> None:
        """Raise MemoryStoreError unless all memories were made by what has this fingerprint (a bundle's)."""
        for memory in self.memories.values():
            memory.check(fingerprint)

    def get(self, ids: Sequence[tuple[str, int]]) -> list[Reference]:
        """The clips of these (memory name, id), in this order. Raises InputError and MemoryStoreError for unknown ones."""
        found = []
        for item in listed("ids", ids, "pairs of a memory's name and the id of a clip"):
            good = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and item[0] in self.memories
            if not good:
                names = sorted(self.memories)
                raise InputError(f"a clip of a set is (memory name, id), the name one of {names}; got {shown(item)}.")
            found.append(replace(self.memories[item[0]].get([item[1]])[0], memory=item[0]))
        return found

    def found(self, part: str | None, query: NDArray[Any], k: int, search: Search, text: str | None = None) -> list[Found]:
        pool = list[Found]()
        for name, memory in self.memories.items():
            for found in memory.found(part, query, k, search, text):
                score, words = (value * self.weights[name] for value in (found.reference.score, found.reference.words))
                pool.append(found._replace(reference=replace(found.reference, memory=name, score=score, words=words)))
        pool.sort(key=lambda found: -relevance(found, search))
        every = Ranked(np.arange(len(pool)), np.array([found.reference.score for found in pool], np.float32), True)
        again = replace(search, minimum_score=None, minimum_probability=None)  # applied to each memory's own
        compared = "" if search.distinct is None else next(iter(self.memories.values())).layout.floating().name
        return pick(lambda want: every, lambda best: [pool[i] for i in best.ids], again, search.pool(k), compared)

    def _too_few(self, found: int, search: Search) -> str:
        text = f"the motion memories {sorted(self.memories)} hold {found or 'no'} clips that pass"
        return f"{text}. Ask for fewer, or add clips: `motionrt memory add MEMORY clip.mp4`"
