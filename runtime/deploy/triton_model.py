"""The Python model that a repository of `motionrt deploy triton` names: what Triton Inference Server calls.

An instance answers one request at a time; others wait in Triton's queue, which knows their priorities and limits. Between two
calls of graphs it says how far it is, and looks whether it is still wanted: a cancelled request ends within one step.
"""

from __future__ import annotations

import base64
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb  # type: ignore[import-not-found]  # only Triton has it

from motionrt.runtime.backends.auto import backend_for
from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.deploy.tensors import request_of
from motionrt.runtime.errors import InputError, MediaError, MotionRTError
from motionrt.runtime.media.video import write_video
from motionrt.runtime.pipeline import MotionPipeline, Result

_log = logging.getLogger(__name__)


class TritonPythonModel:
    """See the module; its methods are those that Triton calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle and the memory that the model's parameters name, and load all that a request needs. Raises
        `MotionRTError`: Triton then says why the model is not there."""
        parameters = {name: one["string_value"] for name, one in json.loads(args["model_config"])["parameters"].items()}
        options = RunOptions(**json.loads(parameters["options"]))
        if args["model_instance_kind"] == "GPU":
            options = replace(options, device=f"cuda:{args['model_instance_device_id']}")
        folder = Path(args["model_repository"])  # where relative paths begin
        memory = folder / parameters["memory"] if "memory" in parameters else None
        bundle = folder / parameters["bundle"]
        self.pipeline = MotionPipeline.from_bundle(bundle, memory, backend=backend_for(Bundle.open(bundle), options))
        self.pipeline.warm()

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer each request through its own sender; what goes wrong with one is its answer."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except Exception as error:
                sender.send(pb.InferenceResponse(error=_told(error)), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Close what was opened."""
        self.pipeline.close()

    def _answer(self, request: Any, sender: Any) -> None:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        asked, output = request_of(self.pipeline, given)
        job, bundle = self.pipeline.start(asked), self.pipeline.bundle
        steps = sum(count for graph, count in job.calls().items() if bundle.in_loop(graph))
        for call in job:
            if request.is_cancelled():
                job.close()
                pb.Logger.log_info(f"cancelled after {len(job.step_seconds)} of {steps} steps")
                error = pb.TritonError("the client does not want the video any more.", pb.TritonError.CANCELLED)
                sender.send(pb.InferenceResponse(error=error), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                return
            progress = np.array([min(1.0, len(job.step_seconds) / steps) if steps else 0.0], np.float32)
            sender.send(pb.InferenceResponse([_strings("stage", call.graph), pb.Tensor("progress", progress)]))
        result = self.pipeline.result(job)
        made = [pb.Tensor("fps", np.array([result.fps], np.float32)), _strings("about", json.dumps(_about(result)))]
        if result.field is not None:
            made.append(pb.Tensor("field", result.field))
        if output == "frames":
            made.append(pb.Tensor("frames", result.frames))
        else:
            made.append(_strings("video", _mp4(result) if output == "mp4" else base64.b64encode(_mp4(result))))
        sender.send(pb.InferenceResponse(made), flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _told(error: Exception) -> Any:
    """What a client is told of an error: our own words; of what is nobody's but ours no more than its kind."""
    if isinstance(error, InputError | MediaError):
        return pb.TritonError(str(error), pb.TritonError.INVALID_ARG)
    if isinstance(error, MotionRTError):
        return pb.TritonError(str(error), pb.TritonError.INTERNAL)
    _log.error("a request failed", exc_info=error)
    return pb.TritonError(f"a fault of the model ({type(error).__name__}); its log says more.", pb.TritonError.INTERNAL)


def _strings(name: str, value: str | bytes) -> Any:
    return pb.Tensor(name, np.array([value.encode() if isinstance(value, str) else value], np.object_))


def _mp4(result: Result) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, result.frames, result.fps)
        return path.read_bytes()


def _about(result: Result) -> dict[str, Any]:
    """What there is to know of a result besides its frames; no folder of this machine is in it."""
    references = [
        {"id": one.id, "caption": one.caption, "source": Path(one.source).name}
        | ({} if np.isnan(one.score) else {"score": float(one.score)})
        for one in result.references
    ]
    return {
        "seed": result.seed, "references": references, "fallback": result.fallback, "notes": list(result.notes),
        "approximations": list(result.approximations), "backend": result.backend, "seconds": result.seconds,
    }  # fmt: skip
