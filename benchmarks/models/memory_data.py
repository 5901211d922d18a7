"""The data of bench_memory: synthetic embeddings that lie as sentence embeddings do, and the measurement that says so.

A binary tree of random directions. Two clips have in common what the nodes above them both have: START, and STEP for each
level, as shares of a unit vector's squared length (so of a cosine). The rest is the clip's own. START and STEP were read off
all-MiniLM-L6-v2 embeddings of English sentences: there the median cosine of the n-th nearest of N falls by about 0.0375
each time n / N doubles. Run as a script, this embeds sentences again and prints both profiles:

    .venv-dev/bin/python benchmarks/models/memory_data.py --sentences 10000
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness

START, STEP, DEPTH, CHUNK = 0.08, 0.0375, 16, 10_000
RANKS = (1, 3, 10, 30, 100, 300, 1000, 3000)
Floats = NDArray[np.float32]


@functools.cache
def leaves(size: int) -> Floats:
    """The sums of the nodes above each leaf, [2**DEPTH,size]; made once, not to be written to."""
    random = np.random.default_rng(1)

    def parts(count: int, share: float) -> Floats:
        return random.standard_normal((count, size), np.float32) * np.float32(np.sqrt(share / size))

    sums = parts(1, START)
    for _ in range(DEPTH):
        sums = np.repeat(sums, 2, axis=0)
        sums += parts(len(sums), STEP)
    return sums


def draw(tree: Floats, count: int, seed: int) -> Floats:
    """`count` unit vectors below random leaves: clips, or queries with another seed."""
    random = np.random.default_rng([2, seed])
    size = tree.shape[1]
    own = random.standard_normal((count, size), np.float32) * np.float32(np.sqrt((1 - START - STEP * DEPTH) / size))
    vectors = tree[random.integers(len(tree), size=count)] + own
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def chunks(tree: Floats, count: int) -> Iterator[Floats]:
    """All embeddings of a data set of `count` clips, in the order of their ids."""
    for start in range(0, count, CHUNK):
        yield draw(tree, min(CHUNK, count - start), start)


def profile(vectors: Floats) -> dict[str, float]:
    """Median cosine of the n-th nearest, and the local intrinsic dimension (Levina and Bickel, 2004, 100 neighbours)."""
    rows = np.random.default_rng(0).choice(len(vectors), 300, replace=False)
    cosines = -np.sort(-(vectors[rows] @ vectors.T), axis=1)[:, 1:]
    distances = np.sqrt(2 - 2 * np.clip(cosines[:, :100], -1, 1 - 1e-6))
    dimension = -1 / np.log(distances[:, :-1] / distances[:, -1:]).mean(axis=1)
    found = {f"cosine_{n}": float(np.median(cosines[:, n - 1])) for n in RANKS if n <= cosines.shape[1]}
    return {**found, "local_dimension": float(np.median(dimension))}


def sentences(count: int) -> list[str]:
    """English sentences out of the docstrings of what is installed, the same for the same packages."""
    found: set[str] = set()
    for file in sorted(Path(sysconfig.get_paths()["purelib"]).glob("**/*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", ast.get_docstring(node) or ""):
                    text = " ".join(part.split())
                    if 25 < len(text) < 160 and text[0].isalpha() and text.count(" ") > 4:
                        found.add(text)
    if len(found) < count:
        raise SystemExit(f"the installed packages have {len(found)} sentences; ask for at most as many.")
    ordered = sorted(found)
    return [ordered[row] for row in np.random.default_rng(0).choice(len(ordered), count, replace=False)]


def main() -> None:
    """Embed sentences, and keep both profiles as rows."""
    from motionrt.benchmarks.pipeline import DEMO, open_pipeline

    parser = argparse.ArgumentParser(description="Do the synthetic embeddings lie as those of sentences do?")
    parser.add_argument("--sentences", type=int, default=10_000)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args()
    with open_pipeline(DEMO / "bundle", DEMO / "memory") as pipeline:
        real = np.concatenate([pipeline.embed(text).reshape(1, -1) for text in sentences(options.sentences)])
    real /= np.linalg.norm(real, axis=1, keepdims=True)
    made = np.concatenate(list(chunks(leaves(real.shape[1]), len(real))))
    for name, vectors in (("sentences, all-MiniLM-L6-v2", real), ("synthetic", made)):
        row = {"what": "profile", "data": name, "clips": len(vectors), "embedding": vectors.shape[1], **profile(vectors)}
        print(row)
        harness.append_row("memory_data", row, folder=options.results)


if __name__ == "__main__":
    main()
