"""The options of a search, spelled here and nowhere else, and its filters as SQL. Only the standard library is imported."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence, Sized
from copy import copy
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from motionrt.runtime.arguments import flag, listed, text_of
from motionrt.runtime.errors import InputError, shown

_MOST = 30_000  # values of one key, and the key: SQLite takes 32,766 in a statement
FEW = 4096  # clips that a filter may leave for an exact scan of them to be the cheapest way

WORDS = 1.0  # weight of the words' share beside the cosine; chosen by benchmarks/retrieval, on the split that is for choosing
AGREEMENT = 0.25  # weight of the motion's agreement; likewise
PROBABLE = 0.1  # from which on a clip is used where no number of clips was asked for; likewise
WORTH = ("score", "words", "agreement", "looks", "probability")  # fields of a reference that say what it is worth, or NaN
POOL = 16  # best clips by vectors, and as many by words, among which both are counted

Where = Mapping[str, str | Sequence[str]]


def _option(words: str, option: str | None = None) -> Any:
    return field(default=None, metadata={"help": words, "option": option})


@dataclass(frozen=True)
class Search:
    """What a search leaves out and how it orders. Commands that search have these options (`with_search_options`).

    What is left out: `where`: {"dataset" or a metadata key: value, or list of allowed values}, all of which must hold;
    `exclude_source`: clips of this source, or of any of these; `least_seconds`, `most_seconds`: shorter and longer clips;
    `minimum_score`: a cosine, clips below it; `minimum_probability`: clips less likely to move as a text says
    (`Reference.probability`; where that is not known, none); `distinct`: a cosine of the first float part of records above
    which a clip counts as a copy of a better one (among the best 4096). With one of the last three, fewer clips than were asked
    for may come back.

    How it orders: `words`: how much the share of the prompt's words in a caption counts beside the cosine, where a search has a
    text and the memory keeps words; `agreement`: how much it counts that a clip moves as the other candidates do, by the first
    float part of records, where that has up to 2^20 numbers. Both count in searches with a text, unless they are 0; agreement
    also in others, if it is given. `diversity`: 0 (off) to 1; re-ranks the best 4 k + 16 by maximal marginal relevance.
    `looks`: of the best 2 k + 3, those that look most like the still of the request (with `words` and `agreement` 0 it is
    `rag_text_image` of MotionRAG's release).

    `without_damaged`: go on without clips that are damaged, and log which; else one of them among what the search reads is an
    error. InputError for what is not allowed.
    """

    where: Where | None = _option("Only clips of this dataset or metadata; a key again: any of its values.")
    exclude_source: str | Sequence[str] | None = _option("Leave out clips of this source; again: of any of these.")
    least_seconds: float | None = _option("Only clips that last so long at least.", "--min-seconds")
    most_seconds: float | None = _option("Only clips that last so long at most.", "--max-seconds")
    minimum_score: float | None = _option("Only clips with at least this cosine.", "--min-score")
    minimum_probability: float | None = _option(
        f"Only clips that move as asked with this probability; for a video {PROBABLE:g}, if no number of clips is given.",
        "--min-probability",
    )
    distinct: float | None = _option("Leave out copies: cosine of records (their first float part) from which one is a copy.")
    diversity: float | None = _option("Prefer clips that differ: 0 off, up to 1.")
    words: float | None = _option(f"How much the prompt's words count beside its vector: 0 off; {WORDS:g} if not given.")
    agreement: float | None = _option(f"How much it counts to move as the others found do: 0 off; {AGREEMENT:g} if not given.")
    looks: bool = field(
        default=False,
        metadata={"help": "Of the clips found by words, those that look most like the still.", "option": "--looks"},
    )
    without_damaged: bool = field(
        default=False, metadata={"help": "Go on without clips that are damaged, and say which.", "option": "--without-damaged"}
    )

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value: Any = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)  # NumPy's numbers too; NaN fails the range
            if value is not None and not (number and low <= value <= high):
                raise InputError(f"{name} is {shown(value)}; allowed is a number from {low} to {high:g}, or None.")
        flag("without_damaged", self.without_damaged)
        flag("looks", self.looks)
        sources = self.exclude_source
        if sources is not None and not isinstance(sources, str):
            object.__setattr__(self, "exclude_source", tuple(listed("exclude_source", sources, "texts")))
        for source in self.sources:
            text_of("exclude_source", source)
        try:
            texts = [[key, *values] for key, values in self.tags()]
            good = all(1 < len(text) <= _MOST and text[0] and "".join(text).encode() is not None for text in texts)
        except (TypeError, AttributeError, UnicodeEncodeError):
            good = False
        if not good:
            allowed = '{"dataset": "name", "a metadata key": ["one", "or other"]}, valid text'
            raise InputError(f"where is {shown(self.where)}; allowed is {allowed}, up to {_MOST - 1:,} values of a key.")

    @property
    def may_be_short(self) -> bool:
        """Whether fewer clips than were asked for are an answer."""
        return not self.minimum_score is self.minimum_probability is self.distinct is None

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources whose clips are left out."""
        given = self.exclude_source
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    @property
    def filters(self) -> bool:
        """Whether a clip's own row says if it is left out."""
        return bool(self.where or self.sources) or not self.least_seconds is self.most_seconds is None

    def lenient(self) -> Search:
        """The same, but satisfied with as many clips as there are: for a number of clips that nobody asked for."""
        return self if self.minimum_score is not None else replace(self, minimum_score=-1.0)  # any cosine will do

    def likely(self) -> Search:
        """The same without clips that hardly can be right, unless it says what it takes: for clips that are to be used."""
        return self if self.minimum_probability is not None else replace(self, minimum_probability=PROBABLE)

    def pool(self, k: int) -> int:
        """How many of the best clips are needed for choosing `k`."""
        if self.looks:
            return 2 * k + 3
        return max(4 * k + 16 if self.diversity else k, k + 8 if self.agreement else k)

    def with_text(self) -> Search:
        """The same, with what is usual for a search with a text where nothing else was said."""
        search = copy(self)  # not `replace`, which checks everything again
        object.__setattr__(search, "words", WORDS if self.words is None else self.words)
        object.__setattr__(search, "agreement", AGREEMENT if self.agreement is None else self.agreement)
        return search

    def leaves_few(self, db: sqlite3.Connection) -> bool:
        """Whether `where` leaves so few clips that scanning them is cheapest; reads no more than that many tags."""
        question = "SELECT COUNT(*) FROM (SELECT 1 FROM tags WHERE key = ? AND value IN ({}) LIMIT ?)"
        return any(
            db.execute(question.format(marks(values)), (key, *values, FEW + 1)).fetchone()[0] <= FEW
            for key, values in self.tags()
        )

    def tags(self) -> Iterator[tuple[str, list[str]]]:
        """Each key with the list of the values that it may have."""
        for key, values in () if self.where is None else self.where.items():
            yield key, [values] if isinstance(values, str) else list(values)


_RANGES = (
    ("minimum_score", -1, 1), ("minimum_probability", 0, 1), ("distinct", -1, 1), ("diversity", 0, 1), ("words", 0, 10),
    ("agreement", 0, 10), ("least_seconds", 0, 1e6), ("most_seconds", 0, 1e6),
)  # fmt: skip
EVERYTHING = Search()


def marks(values: Sized) -> str:
    """A question mark for each value, for SQL."""
    return ",".join("?" * len(values))
