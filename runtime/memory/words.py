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
_SHAPES = frozenset("@circle @straight @arc @eight @zigzag @spiral @loop".split())
_SUBJECT = re.compile(  # what stands between an article and the first word that may be a verb: "a green circle takes ..."
    r"(?:an?|the|one)(?: [a-z]+){0,2}? ([a-z]+) (?!(?:as|its|his|this|[a-z]*(?:ss|us|wards|ways))\b)[a-z]+s\b"
)
_INSIDE = re.compile(r"\bin (?=(?:an?|the|its|his|her|their|this|one|place)\b)")  # a place, not a direction as in "zooms in"
_JOINED = re.compile(r"\b(counter|anti|zig)s?[\s-]+(?=clockwise|zag)")
_WORD = re.compile(r"(?<![^\W_])(?!\d{5,}(?![^\W_]))[^\W_]{1,64}")  # no numbers of five digits and more
_TOKEN = re.compile(rf"{_WORD.pattern}|[^\w\s'’-]")
_SPACED = bytes(code if chr(code).isalnum() or code == 10 else 32 for code in range(256))  # of ASCII, what is no word


def words_of(text: str) -> list[str]:
    """The words of a text in their order: folded, without accents, cut at 64 letters, and without numbers of five digits."""
    return list(_WORD.findall(_plain(text)))


def sets_of(texts: Sequence[str]) -> list[set[str]]:
    """The words of each of some texts; of plain ASCII for a fifth of the time, since a search looks at three dozen captions."""
    plain = _plain("\n".join(texts))
    if plain.isascii() and plain.count("\n") == len(texts) - 1:
        found = [{*line.split()} for line in plain.encode().translate(_SPACED).decode().split("\n")]
        if not any(len(word) > 4 and (len(word) > 64 or word.isdecimal()) for word in set().union(*found)):
            return found
    return [{*words_of(text)} for text in texts]


def term_of(word: str) -> str:
    """What a word of `words_of` stands for: "@left" for a motion that it names, else its English stem."""
    stem = _stem(word)
    return _motions().get(stem, stem)


class Vocabulary:
    """The words of all captions of a memory. counts: how many captions have each; captions: how many there are."""

    def __init__(self, counts: Mapping[str, int], captions: int) -> None:
        self.counts, self.captions = counts, captions
        self.length = max(sum(counts.values()) / max(captions, 1), 1.0)  # words of a caption, in the mean
        self._sorted, self._known = sorted(counts), dict[str, tuple[list[str], int, float]]()

    def known(self, term: str) -> tuple[list[str], int, float]:
        """The words here that stand for `term`, how often captions have them, and what the term weighs in a prompt."""
        if term not in self._known:
            stems = [stem for stem, name in _motions().items() if name == term] if term.startswith("@") else [term]
            words = sorted({word for stem in stems for word in self._with(stem) if term_of(word) == term})
            often = sum(self.counts[word] for word in words)
            captions = min(often, self.captions)
            rare = math.log(1 + (self.captions - captions + 0.5) / (captions + 0.5))
            self._known[term] = words, often, rare * (MOTION if term.startswith("@") else 1.0)
        return self._known[term]

    def _with(self, stem: str) -> list[str]:
        """The words that may have a stem: those that begin with it, or are it where it is short."""
        if len(stem) < 3:
            return [stem] if stem in self.counts else []
        start = stem[:-1] if stem.endswith("i") else stem  # "fly" and "flies" have the stem "fli"
        low, high = bisect_left(self._sorted, start), bisect_left(self._sorted, f"{start}\U0010ffff")
        return self._sorted[low:high]


class Asked:
    """The terms of a prompt that a memory knows: their words, weights (below 0: ruled out), and how often they are there."""

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        self.words, self.weights, self.often = dict[str, list[str]](), dict[str, float](), dict[str, int]()
        self._terms, self._length = dict[str, str](), vocabulary.length
        for sign, terms in zip((1, -1), terms_of(text), strict=True):
            for term in terms:
                words, often, weight = vocabulary.known(term)
                if words:
                    self.words[term], self.weights[term], self.often[term] = words, sign * weight, often
                    self._terms |= dict.fromkeys(words, term)
        self._total = sum(weight for weight in self.weights.values() if weight > 0)

    def shares(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """How much of what was asked for each caption has, float32 [N] in [-1, 1]; a short caption more than a long one."""
        if not self._total:
            return np.zeros(len(captions), np.float32)
        known, term_of_word, weight_of, shares = frozenset(self._terms), self._terms.__getitem__, self.weights.__getitem__, []
        for words in sets_of(captions):
            had = sum(map(weight_of, {*map(term_of_word, words & known)}))
            factor = (_K1 + 1) / (1 + _K1 * (1 - _B + _B * len(words) / self._length))
            shares.append(min(max(had * factor / self._total, -1.0), 1.0))
        return np.array(shares, np.float32)


@lru_cache(1024)
def terms_of(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The terms that a prompt asks for, and those that it rules out: what follows a negation up to the next comma or "but".

    A shape that is what moves is no motion, and neither is "in" before a place.
    """
    wanted, unwanted, ruled_out = dict[str, None](), dict[str, None](), False
    plain = _INSIDE.sub("", _plain(text))
    subject = _SUBJECT.match(plain)
    for match in _TOKEN.finditer(plain):
        token = match.group()
        if token in _NEGATIONS:
            ruled_out = True
        elif not token[0].isalnum() or token in _GO_ON:
            ruled_out = False
        else:
            term = term_of(_mended(token))
            if subject is None or match.start() != subject.start(1) or term not in _SHAPES:
                (unwanted if ruled_out else wanted)[term] = None
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
