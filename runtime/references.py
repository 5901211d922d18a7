"""Which clips lend a request their motion: given by hand, or searched for in the motion memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError

if TYPE_CHECKING:
    from motionrt.runtime.bundle.manifest import Model
    from motionrt.runtime.memory.memory import MotionMemory, Reference
    from motionrt.runtime.memory.set import MemorySet
    from motionrt.runtime.request import Prepared, Request

    Memory = MotionMemory | MemorySet


def choose_references(
    request: Request, prepared: Prepared, model: Model, memory: Memory | None, embed: Callable[[str], NDArray[np.float32]]
) -> list[Reference]:
    """The clips of `request`, most similar first: those given by hand, or found in `memory` by `embed(prompt)`.

    The time is added to stages text and search of `prepared`. Raises `InputError` for references that the bundle's `model`
    does not take, and `MemoryStoreError` as `MotionMemory.search` does.
    """
    given = request.references
    if given is not None and not isinstance(given, int | Sequence) or isinstance(given, str | bool):
        raise InputError(f"references is {given!r}; give a number of clips or a list of references.")
    count = given if isinstance(given, int) else model.default_references if given is None else len(given)
    if not 1 <= count <= model.max_references:
        raise InputError(
            f"references is {count}; this bundle takes 1 to {model.max_references}. "
            "For no motion at all use motion_scale=0."
        )
    by_hand = [] if given is None or isinstance(given, int) else list(given)
    for item in by_hand:
        if isinstance(item, int | np.integer):
            continue
        for name in ("motion", "appearance"):
            shape = getattr(getattr(item, name, None), "shape", None)
            if shape != model.motion_tokens:
                raise InputError(
                    f"references holds {item!r:.60} whose {name} tokens are {shape}; this bundle takes references "
                    f"(or ids of clips in the memory) with tokens {model.motion_tokens}."
                )
    if memory is None and (not by_hand or any(isinstance(item, int | np.integer) for item in by_hand)):
        raise InputError(
            "this pipeline has no motion memory to find motion in; open it with one "
            "(MotionPipeline.from_bundle(bundle, memory=...)), pass references=[...], or use motion_scale=0."
        )
    if by_hand:
        with prepared.stage("search"):
            return [_by_id(memory, item) if isinstance(item, int | np.integer) else item for item in by_hand]
    assert memory is not None
    with prepared.stage("text"):
        embedding = embed(request.prompt)
    with prepared.stage("search"):
        # The default bends to what there is (any cosine will do, but fewer clips as well); a number that was asked for
        # does not (search says so).
        minimum = -1.0 if given is None and request.minimum_score is None else request.minimum_score
        return memory.search(
            embedding,
            count,
            where=request.where,
            minimum_score=minimum,
            diversity=request.diversity,
            distinct=request.distinct,
        )


def _by_id(memory: Memory | None, number: int) -> Reference:
    from motionrt.runtime.memory.set import MemorySet

    assert memory is not None
    if isinstance(memory, MemorySet):
        raise InputError(f"references holds the id {number}, and the memory is a set; pass memory.get([(name, id)]).")
    return memory.get([int(number)])[0]
