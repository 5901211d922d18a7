"""Damage to files of every kind: a wrong byte, a part of another, an end that is missing, a number of the text that differs.

What is asked of a damaged file, as a user would, must give one MotionRTError or exactly the undamaged answer. A picture or a
text of a format without checksums may also be another one, if its decoder does not complain: that is an outcome of its own.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.benchmarks.reliability.tries import Attempt, Outcome
from motionrt.runtime.errors import MotionRTError

_BLOCK = 512  # bytes: a part of a file that stands in the place of another; SQLite's pages are 16 of them


@dataclass(frozen=True)
class Subject:
    """Sound files of one kind. files: which are damaged, one at a time; questions: what is asked, each an answer that can be
    compared or a MotionRTError.

    other: the outcome where an answer differs and nothing in the file could tell; "": that is wrong. right: whether the
    answer to a question is the undamaged one, given those to all.
    """

    files: Sequence[Path]
    questions: Mapping[str, Callable[[], Any]]
    other: str = ""
    right: Callable[[str, Any, Mapping[str, Any]], bool] = lambda name, got, want: bool(got == want[name])
    tidy: Callable[[], object] = lambda: None


def attempts(kind: str, folder: Path) -> Attempt:
    """The tries of one of `subjects.KINDS`."""
    from motionrt.benchmarks.reliability.subjects import KINDS

    subject = KINDS[kind](folder)
    files = {file: file.read_bytes() for file in subject.files}
    want = {name: ask() for name, ask in subject.questions.items()}
    subject.tidy()
    again = {name: ask() for name, ask in subject.questions.items()}
    subject.tidy()
    assert all(subject.right(name, got, want) for name, got in again.items()), f"{kind}: undamaged, it answers differently"

    def attempt(number: int) -> Iterator[Outcome]:
        draw = random.Random(f"{kind} {number}")
        file = draw.choice(list(files))
        try:
            _replace(file, damage(files[file], draw))
            yield _outcome(subject, want)
        finally:
            _replace(file, files[file])
            subject.tidy()

    return attempt


def _outcome(subject: Subject, want: Mapping[str, Any]) -> Outcome:
    """What the questions come to: the worst of them."""
    found = "same"
    for name, ask in subject.questions.items():
        try:
            got = ask()
        except MotionRTError as error:
            if not str(error).strip():
                return "raw", f"{name}: a {type(error).__name__} that says nothing"
            found = "error"
            continue
        except Exception as error:
            return "raw", f"{name}: {type(error).__name__}: {error}"[:500]
        if not subject.right(name, got, want):
            if not subject.other:
                return "wrong", name
            found = subject.other if found == "same" else found
    return found, ""


def damage(good: bytes, draw: random.Random) -> bytes:
    """Other bytes than `good`, by one of the ways in which files are damaged; half the time by their structure, if they are
    JSON or another text."""
    for _ in range(100):
        text = _text(good) if draw.random() < 0.5 else None
        data = _bytes(bytearray(good), draw) if text is None else _structure(text, draw).encode()
        if data != good:
            return data
    return b""


def _bytes(data: bytearray, draw: random.Random) -> bytes:
    size = len(data)
    if not size:
        return b"\0"
    at = draw.randrange(size)
    length = min(draw.choice([2, 16, 512, 4096]), size - at)
    match draw.choice(["bit", "bit", "bit", "bytes", "head", "length", "zeros", "noise", "block", "cut", "gap", "more"]):
        case "bit":
            data[at] ^= 1 << draw.randrange(8)
        case "bytes":
            for _ in range(draw.randint(1, 9)):
                data[draw.randrange(size)] = draw.randrange(256)
        case "head":
            for _ in range(3):
                data[draw.randrange(min(size, 200))] = draw.randrange(256)
        case "length":  # where a number of bytes stands, one that is far too large
            data[at : at + 4] = bytes([255, 255, 255, draw.randrange(256)])[: size - at]
        case "zeros":
            data[at : at + length] = bytes(length)
        case "noise":
            data[at : at + length] = draw.randbytes(length)
        case "block":
            block = _BLOCK * draw.choice([1, 16])
            to, of = (block * draw.randrange(max(size // block, 1)) for _ in range(2))
            data[to : to + block] = data[of : of + block]
        case "cut":
            del data[at:]
        case "gap":
            del data[at : at + length]
        case _:
            data[at:at] = data[:length]
    return bytes(data)


def _text(data: bytes) -> str | None:
    """The text of a file that is one."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return text if text.strip() and "\0" not in text else None


def _structure(text: str, draw: random.Random) -> str:
    """A text with one thing of its structure changed: of JSON a key or a value, else a line or a number."""
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if isinstance(tree, (dict, list)) and tree:
        _edit(tree, draw)
        return json.dumps(tree, indent=1)
    lines = text.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    match draw.choice(["digit", "drop", "twice", "swap"]):
        case "digit":
            places = [place for place, sign in enumerate(text) if sign.isdigit()] or [0]
            place = draw.choice(places)
            return f"{text[:place]}{draw.randrange(10)}{text[place + 1 :]}"
        case "drop":
            del lines[at]
        case "twice":
            lines.insert(at, lines[at])
        case _:
            other = draw.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
    return "".join(lines)


def _edit(tree: Any, draw: random.Random) -> None:
    """Change one key or value somewhere in a tree of JSON."""
    places: list[tuple[Any, Any]] = []
    todo = [tree]
    for node in todo:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        places += [(node, key) for key in keys]
        todo += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    node, key = draw.choice(places)
    value = node[key]
    others: list[Any] = [None, True, 0, 1, -1, 2**70, 1e308, "", "x", "../x", [], {}, [[[]]]]
    match draw.choice(["drop", "other", "near", "near", "key"]):
        case "drop":
            del node[key]
        case "near" if isinstance(value, (int, float)):
            node[key] = value + draw.choice([-1, 1, 2, 0.5])
        case "near" if isinstance(value, str) and value:
            place = draw.randrange(len(value))
            node[key] = value[:place] + draw.choice("0123456789abcdefghijklmnopqrstuvwxyz/\ud800") + value[place + 1 :]
        case "key" if isinstance(key, str):
            node[key + "x"] = node.pop(key)
        case _:
            node[key] = draw.choice(others)


def _replace(file: Path, data: bytes) -> None:
    """Other bytes under the same name, as another file: a program may still have the old one mapped."""
    beside = file.with_name(f"{file.name}.try")
    beside.write_bytes(data)
    os.replace(beside, file)


def digest(data: bytes) -> int:
    """Stands for an answer that is large."""
    return zlib.crc32(data)
