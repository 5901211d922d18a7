"""Where everything in a clip goes, found in its pictures: dense optical flow by OpenCV, which is an optional extra (`flow`)."""

from __future__ import annotations

import importlib.util

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError, install

_LEAST = 128  # pixels that the shorter side has at least where flow is computed: coarser levels of less tell nothing apart


def check_flow(what: str, instead: str) -> None:
    """`InputError` where there is no OpenCV. what: has no motion field; instead: the other way to one."""
    if importlib.util.find_spec("cv2") is None:
        raise InputError(f"{what} has no motion field. {instead}; or install OpenCV, which finds one: {install('flow')}.")


def dense_flow(video: NDArray[np.float32]) -> NDArray[np.float32]:
    """`video [F, 3, H, W]` in [-1, 1] -> its field `[F - 1, 2, H, W]` float32: how far each pixel of the first picture has gone
    in each one behind it, x right and y down, in pixels.

    DIS (Kroeger 2016, arXiv 1603.03590) from the first picture to each other one; each search begins with what was found for
    the one before, without which an object that goes far is lost. What comes to be covered, or is smooth, gets what lies
    around it. One thread: what the stripes of several find depends on how many there are.
    """
    import cv2

    frames, _, height, width = video.shape
    scale = max(1, -(-_LEAST // min(height, width)))
    pixels = np.rint((video + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    greys = [cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY) for picture in pixels]
    if scale > 1:
        greys = [cv2.resize(grey, (width * scale, height * scale), interpolation=cv2.INTER_LINEAR) for grey in greys]
    threads, made = cv2.getNumThreads(), np.zeros((frames - 1, 2, height, width), np.float32)
    cv2.setNumThreads(1)
    try:
        dis, flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM), None
        for target in range(1, frames):
            flow = dis.calc(greys[0], greys[target], flow)
            small = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / scale if scale > 1 else flow
            made[target - 1] = small.transpose(2, 0, 1)
    finally:
        cv2.setNumThreads(threads)
    return made
