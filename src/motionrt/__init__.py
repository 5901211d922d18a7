"""MotionRT: a deployment runtime for motion-conditioned image-to-video diffusion."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # not of `typing`, which takes milliseconds in which Ctrl-C is not looked after yet (__main__.py)
if TYPE_CHECKING:
    from typing import Any

    from motionrt.runtime.adapters.diffusers import DiffusersPipeline
    from motionrt.runtime.errors import MotionRTError
    from motionrt.runtime.memory.memory import MotionMemory
    from motionrt.runtime.pipeline import MotionPipeline, Result

# ONNX Runtime from 1.29 on sends telemetry on Linux, and keeps a device's name and a queue in HOME, unless the first of these
# is set before it is imported; the second is what other libraries go by (donottrack.sh), also those that only begin to send.
# Every module of ours is imported after this line; what a user has set stays.
for _name in ("ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")

__version__ = "0.1.0"
__all__ = ["DiffusersPipeline", "MotionMemory", "MotionPipeline", "MotionRTError", "Result", "__version__"]

_HOME = {
    "DiffusersPipeline": "motionrt.runtime.adapters.diffusers",
    "MotionMemory": "motionrt.runtime.memory.memory",
    "MotionPipeline": "motionrt.runtime.pipeline",
    "Result": "motionrt.runtime.pipeline",
    "MotionRTError": "motionrt.runtime.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import motionrt` stays instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'motionrt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
