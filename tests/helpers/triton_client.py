"""What a gRPC client sees, as JSON; run in .venv-triton: python triton_client.py ADDRESS MODEL CONFIG STILL.npy"""

from __future__ import annotations

import hashlib
import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

KINDS = {"object": "BYTES", "uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float32": "FP32"}


class Stream:
    """One stream of requests and their answers."""

    def __init__(self, client: Any, model: str) -> None:
        self.client, self.model, self.answers = client, model, queue.Queue()
        client.start_stream(lambda result, error: self.answers.put((result, error)))

    def ask(self, name: str, **given: Any) -> None:
        inputs = []
        for key, value in given.items():
            array = np.array([value.encode()], np.object_) if isinstance(value, str) else value
            inputs.append(grpc.InferInput(key, list(array.shape), KINDS[str(array.dtype)]))
            inputs[-1].set_data_from_numpy(array)
        self.client.async_stream_infer(self.model, inputs, request_id=name)

    def next(self) -> tuple[str, dict[str, Any]]:
        """The id of a request, and its next answer; of an error "error"."""
        result, error = self.answers.get(timeout=60)
        if error is not None:
            return "", {"error": error.message()}
        answer = result.get_response()
        return answer.id, {output.name: result.as_numpy(output.name) for output in answer.outputs}


def main(address: str, model: str, config: str, still: str) -> None:
    parsed = text_format.Parse(Path(config).read_text(), model_config_pb2.ModelConfig())
    told: dict[str, Any] = {"inputs": [one.name for one in parsed.input]}
    told["decoupled"] = parsed.model_transaction_policy.decoupled
    client = grpc.InferenceServerClient(address)
    asked = {"image": np.load(still), "prompt": "a red star bounces in place", "steps": np.array([4], np.int32)}
    stream = Stream(client, model)
    for seed in (1, 2):
        stream.ask(str(seed), **asked, seed=np.array([seed], np.int64))
    told["frames"], told["progress"] = {}, {"1": [], "2": []}
    while len(told["frames"]) < 2:
        name, answer = stream.next()
        if "frames" in answer:
            told["frames"][name] = [list(answer["frames"].shape), hashlib.sha256(answer["frames"].tobytes()).hexdigest()]
        else:
            told["progress"][name].append([answer["stage"][0].decode(), float(answer["progress"][0])])
    stream.ask("bad", **asked | {"steps": np.array([900], np.int32)})
    told["error"] = stream.next()[1]["error"]
    stream.ask("cancelled", **asked | {"steps": np.array([50], np.int32)})
    while (answer := stream.next()[1])["progress"][0] == 0:
        pass
    told["seen"] = round(50 * float(answer["progress"][0]))
    client.stop_stream(cancel_requests=True)
    print(json.dumps(told))


main(*sys.argv[1:])
