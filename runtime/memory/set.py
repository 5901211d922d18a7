"""Several motion memories searched as one: a domain is a memory, and taking one in or out costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError
from motionrt.runtime.memory.memory import MotionMemory, Reference
from motionrt.runtime.memory.ranking import Found, Searchable, pick
from motionrt.runtime.memory.search import Search


class MemorySet(Searchable):
    """Open memories by name, ordered together by score times weight, which is the references' score.

    `minimum_score` is compared with the cosine itself; `distinct` and `diversity` count across memories. The memories stay
    their owner's: one may be in several sets. `close` closes them all.
    """

    def __init__(self, memories: Mapping[str, MotionMemory], weights: Mapping[str, float] | None = None) -> None:
        self.memories = dict(memories)
        self.weights = dict.fromkeys(self.memories, 1.0) | dict(weights or {})
        wrong = [name for name, weight in self.weights.items() if name not in self.memories or not 0 < weight < math.inf]
        if wrong or not self.memories:
            raise InputError(
                f"the weights of a set of memories {sorted(self.memories)} are {dict(weights or {})!r}; allowed are finite"
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
        for item in ids:
            if not isinstance(item, tuple) or len(item) != 2 or item[0] not in self.memories:
                names = sorted(self.memories)
                raise InputError(f"a clip of a set is (memory name, id), the name one of {names}; got {item!r}.")
            found.append(replace(self.memories[item[0]].get([item[1]])[0], memory=item[0]))
        return found

    def found(self, part: str | None, query: NDArray[Any], k: int, search: Search) -> list[Found]:
        pool = list[Found]()
        for name, memory in self.memories.items():
            for reference, vector in memory.found(part, query, k, search):
                pool.append(Found(replace(reference, memory=name, score=reference.score * self.weights[name]), vector))
        pool.sort(key=lambda found: -found.reference.score)
        rows, scores = np.arange(len(pool)), np.array([found.reference.score for found in pool], np.float32)
        again = replace(search, minimum_score=None)  # applied to the cosines
        compared = "" if search.distinct is None else next(iter(self.memories.values())).layout.floating().name
        return pick(lambda want: (rows, scores, True), lambda ids, _: [pool[i] for i in ids], again, search.pool(k), compared)

    def _too_few(self, found: int, search: Search) -> str:
        text = f"the motion memories {sorted(self.memories)} hold {found or 'no'} clips that pass"
        return f"{text}. Ask for fewer, or add clips: `motionrt memory add MEMORY clip.mp4`"
