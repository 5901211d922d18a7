"""The Python model that a repository of `motionrt deploy triton` names: what Triton Inference Server calls.

An instance answers one request at a time; others wait in Triton's queue, which knows their priorities and limits. Between two
calls of graphs it says how far it is, and looks whether it is still wanted: a cancelled request ends within one step.
"""

from __future__ import annotations

import base64
import importlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

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
        self.pb: Any = importlib.import_module("triton_python_backend_utils")  # only Triton has it
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
            sender, final = request.get_response_sender(), self.pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            try:
                last = self._answer(request, sender)
            except Exception as error:
                last = self.pb.InferenceResponse(error=self._told(error))
            sender.send(last, flags=final)

    def finalize(self) -> None:
        """Close what was opened."""
        self.pipeline.close()

    def _answer(self, request: Any, sender: Any) -> Any:
        """Say how far it is after each call; the last answer."""
        asked, output = request_of(self.pipeline, {tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        job, bundle = self.pipeline.start(asked), self.pipeline.bundle
        steps = sum(count for graph, count in job.calls().items() if bundle.in_loop(graph))
        for call in job:
            if request.is_cancelled():
                job.close()
                self.pb.Logger.log_info(f"cancelled after {len(job.step_seconds)} of {steps} steps")
                error = self.pb.TritonError("the client does not want the video any more.", self.pb.TritonError.CANCELLED)
                return self.pb.InferenceResponse(error=error)
            progress = np.array([min(1.0, len(job.step_seconds) / steps) if steps else 0.0], np.float32)
            sender.send(self._response(stage=call.graph, progress=progress))
        result = self.pipeline.result(job)
        values: dict[str, Any] = {"fps": np.array([result.fps], np.float32), "about": json.dumps(_about(result))}
        if output == "frames":
            values["frames"] = result.frames
        else:
            values["video"] = base64.b64encode(_mp4(result)) if output == "base64" else _mp4(result)
        return self._response(**values, field=result.field)

    def _response(self, **values: Any) -> Any:
        """Arrays, texts and bytes as an answer; without those that are None."""
        tensors = []
        for name, value in values.items():
            if isinstance(value, str | bytes):
                value = np.array([value.encode() if isinstance(value, str) else value], np.object_)
            if value is not None:
                tensors.append(self.pb.Tensor(name, value))
        return self.pb.InferenceResponse(tensors)

    def _told(self, error: Exception) -> Any:
        """What a client is told of an error: our own words; of what is nobody's but ours no more than its kind."""
        if isinstance(error, MotionRTError):
            theirs = isinstance(error, InputError | MediaError)
            return self.pb.TritonError(str(error), self.pb.TritonError.INVALID_ARG if theirs else self.pb.TritonError.INTERNAL)
        _log.error("a request failed", exc_info=error)
        text = f"a fault of the model ({type(error).__name__}); its log says more."
        return self.pb.TritonError(text, self.pb.TritonError.INTERNAL)


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
