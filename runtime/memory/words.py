"""What the words of a prompt and of a caption have in common: a share in [-1, 1], beside the cosine of their vectors.

Sentence encoders hardly tell left from right, and one word decides which way things go. So words are counted too, by BM25
(Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009) on terms: a word stands for the motion that it names
(motion_words.txt), else for its stem. What a prompt rules out ("left, not right") counts against a caption.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import snowballstemmer
from numpy.typing import NDArray

MOTION = 3.0  # how much more a word counts that names a motion; chosen as `search.WORDS` was
_K1, _B = 1.2, 0.75  # BM25's usual ones; a caption has a word or has it not, however often
_NEGATIONS = frozenset("not no never without nor instead nicht kein keine ohne statt pas sans jamais ne sin nunca".split())
_GO_ON = frozenset("but then sondern mais sino".split())  # as a comma does: what follows is meant again
_JOINED = re.compile(r"\b(counter|anti|zig)s?[\s-]+(?=clockwise|zag)")
_WORD = re.compile(r"(?<![^\W_])(?!\d{5,}(?![^\W_]))[^\W_]{1,64}")  # no numbers of five digits and more
_TOKEN = re.compile(rf"{_WORD.pattern}|[^\w\s'’-]")


def words_of(text: str) -> list[str]:
    """The words of a text in their order: folded, without accents, cut at 64 letters, and without numbers of five digits."""
    return list(_WORD.findall(_plain(text)))


def term_of(word: str) -> str:
    """What a word of `words_of` stands for: "@left" for a motion that it names, else its English stem."""
    stem = _stem(word)
    return _motions().get(stem, stem)


class Vocabulary:
    """The words of all captions of a memory. counts: how many captions have each; captions: how many there are."""

    def __init__(self, counts: Mapping[str, int], captions: int) -> None:
        self.counts, self.captions = counts, captions
        self.length = max(sum(counts.values()) / max(captions, 1), 1.0)  # words of a caption, in the mean
        self._sorted, self._known = sorted(counts), dict[str, list[str]]()

    def words_for(self, term: str) -> list[str]:
        """The words here that stand for `term`."""
        if term not in self._known:
            stems = [stem for stem, name in _motions().items() if name == term] if term.startswith("@") else [term]
            found = {word for stem in stems for word in self._with(stem) if term_of(word) == term}
            self._known[term] = sorted(found)
        return self._known[term]

    def _with(self, stem: str) -> list[str]:
        """The words that may have a stem: those that begin with it, or are it where it is short."""
        if len(stem) < 3:
            return [stem] if stem in self.counts else []
        start = stem[:-1] if stem.endswith("i") else stem  # "fly" and "flies" have the stem "fli"
        low, high = bisect_left(self._sorted, start), bisect_left(self._sorted, f"{start}\U0010ffff")
        return self._sorted[low:high]


class Asked:
    """The terms of a prompt that a memory knows, and what each weighs."""

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        wanted, unwanted = terms_of(text)
        self.words = {term: vocabulary.words_for(term) for term in (*wanted, *unwanted)}
        self._terms = {word: term for term, words in self.words.items() for word in words}
        self.weights: dict[str, float] = {}
        self._total = 0.0
        self._length = vocabulary.length
        for term, words in self.words.items():
            captions = min(sum(vocabulary.counts[word] for word in words), vocabulary.captions)
            if words:
                rare = math.log(1 + (vocabulary.captions - captions + 0.5) / (captions + 0.5))
                weight = rare * (MOTION if term.startswith("@") else 1.0)
                self.weights[term] = weight if term in wanted else -weight
                self._total += weight if term in wanted else 0.0

    def shares(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """How much of what was asked for each caption has, float32 [N] in [-1, 1]; a short caption more than a long one."""
        if not self._total:
            return np.zeros(len(captions), np.float32)
        told = [{*words_of(caption)} for caption in captions]
        lengths = np.array([len(words) for words in told], np.float64)
        factor = (_K1 + 1) / (1 + _K1 * (1 - _B + _B * lengths / self._length))
        known, weights = self._terms.keys(), self.weights
        sums = [sum(weights[term] for term in {self._terms[word] for word in words & known}) for words in told]
        return np.clip(np.array(sums) * factor / self._total, -1, 1).astype(np.float32)


@lru_cache(1024)
def terms_of(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The terms that a prompt asks for, and those that it rules out: what follows a negation up to the next comma or "but"."""
    wanted, unwanted, ruled_out = dict[str, None](), dict[str, None](), False
    for token in _TOKEN.findall(_plain(text)):
        if token in _NEGATIONS:
            ruled_out = True
        elif not token[0].isalnum() or token in _GO_ON:
            ruled_out = False
        else:
            (unwanted if ruled_out else wanted)[term_of(_mended(token))] = None
    return tuple(wanted), tuple(term for term in unwanted if term not in wanted and term.startswith("@"))


def _plain(text: str) -> str:
    plain = text.lower()
    if not plain.isascii():
        folded = unicodedata.normalize("NFKD", text).casefold()
        plain = "".join(letter for letter in folded if not unicodedata.combining(letter))
    if "clockwise" in plain or "zag" in plain:
        plain = _JOINED.sub(r"\1", plain)
    return plain


@lru_cache(4096)
def _mended(word: str) -> str:
    """A word that names no motion, but would with one letter more, less, other or in the place of its neighbour."""
    if len(word) < 5 or not word.isascii() or term_of(word).startswith("@"):
        return word
    motions, letters = _named(), "abcdefghijklmnopqrstuvwxyz"
    halves = [(word[:at], word[at:]) for at in range(len(word) + 1)]
    other = {a + b[1:] for a, b in halves if b} | {a + b[1] + b[0] + b[2:] for a, b in halves if len(b) > 1}
    other |= {a + x + b for a, b in halves for x in letters} | {a + x + b[1:] for a, b in halves if b for x in letters}
    return min(other & motions, default=word)


@lru_cache(65_536)
def _stem(word: str) -> str:
    return str(_stemmer().stemWord(word))


@cache
def _stemmer() -> snowballstemmer.EnglishStemmer:
    return snowballstemmer.stemmer("english")


@cache
def _motions() -> dict[str, str]:
    """What each stem of motion_words.txt stands for."""
    return {_stem(word): f"@{name}" for name, words in _file().items() for word in words}


@cache
def _named() -> frozenset[str]:
    """The words of motion_words.txt that are long enough to be meant by a misspelt one, and their English forms."""
    long = [word for words in _file().values() for word in words if len(word) > 4]
    return frozenset(form for word in long for form in (word, f"{word}s", f"{word}ing"))


@cache
def _file() -> dict[str, list[str]]:
    text = Path(__file__).with_name("motion_words.txt").read_text(encoding="utf-8")
    lines = [line.partition(":") for line in text.splitlines() if not line.startswith("#")]
    return {name: words.split() for name, _, words in lines}
