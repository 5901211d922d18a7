"""The demo's Motion-I2V as a bundle: `python demo/motion_i2v/export.py [checkpoint] [out]`, about 3 minutes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "motionclone"), str(HERE.parent)]  # in this order: both have a model.py

import model as demo  # noqa: E402
import torch  # noqa: E402
from networks import TARGETS, FieldAutoencoder, load  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training import tokenizer  # noqa: E402

from motionrt.export.checkpoints.encoders import Text  # noqa: E402
from motionrt.export.checkpoints.text_query import packaged_encoder  # noqa: E402
from motionrt.export.exporter import export_system  # noqa: E402
from motionrt.export.systems.decoding import Decoding  # noqa: E402
from motionrt.export.systems.motion_i2v.fields import DecodeFields, Sparse  # noqa: E402
from motionrt.export.systems.motion_i2v.retrieved import Keep, Retrieval, with_memory  # noqa: E402
from motionrt.export.systems.motion_i2v.rows import schedules  # noqa: E402
from motionrt.export.systems.motion_i2v.system import BOTH, MOTION, VIDEO, Parts, motion_system  # noqa: E402
from motionrt.export.systems.motionclone.rows import noise_schedule  # noqa: E402
from motionrt.export.systems.system import Array, Graph, Network, System, TokenizerText  # noqa: E402
from motionrt.runtime.files import sha256_of  # noqa: E402

NetT = TypeVar("NetT", bound=nn.Module)
GUIDANCE = 1.5  # of the fields; the video has no branch without the prompt: its picture and its field say all
STEPS = (8, 10, 12, 16, 20, 25)
DEFAULT = 12  # steps of both loops
UNIT = 4  # px, half the square of a drag: as in training (fields.py)


class Encode(nn.Module):
    """A picture `[1, 3, 64, 64]` in [-1, 1] to latents `[1, 4, 8, 8]`."""

    def __init__(self, vae: demo.FrameAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image)


class Texts(nn.Module):
    """Ids `[B, 12]` to what both stages read of a prompt, side by side: `[B, 12, 2 x 64]`, stage 2's first."""

    def __init__(self, video: nn.Module, motion: nn.Module) -> None:
        super().__init__()
        self.video, self.motion = Text(video), Text(motion)

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.cat([self.video(input_ids), self.motion(input_ids)], -1)


def widened(net: NetT, place: int) -> NetT:
    """A network that reads its part of `Texts`, the first or the second: the weights for the other's are zero."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and ".attentions." in name and name.endswith(("attn2.to_k", "attn2.to_v")):
            blank = torch.zeros_like(layer.weight)
            both = (layer.weight, blank) if place == 0 else (blank, layer.weight)
            layer.weight, layer.in_features = nn.Parameter(torch.cat(both, 1), requires_grad=False), 2 * layer.in_features
    return net


class EncodeFlow(nn.Module):
    """Fields as shares of the picture `[N, 2, 64, 64]` to latents `[N, 4, 8, 8]`."""

    def __init__(self, flow: FieldAutoencoder) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, fields: Tensor) -> Tensor:
        return self.flow.encode(fields)


class DecodeFlow(nn.Module):
    """Latents of fields `[1, 15, 4, 8, 8]` to the fields as shares of the picture `[1, 15, 2, 64, 64]`."""

    def __init__(self, flow: FieldAutoencoder) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, latents: Tensor) -> Tensor:
        return self.flow.decode(latents[0])[None]


def demo_system(checkpoint: Path) -> System:
    """The system of a checkpoint; all of it is in memory, and so every graph is checked against its module."""
    model, words = load(checkpoint), tokenizer()
    alphas, prediction = noise_schedule(demo.SCHEDULER)
    video, fields = Array((1, *demo.LATENTS)), Array((1, TARGETS, *demo.LATENTS[1:]))
    decode = Graph(Network(demo.Decode(model.vae).eval()), {"latents": video}, ("video",))
    moved = Graph(Network(DecodeFields(DecodeFlow(model.flow)).eval()), {"motion_latents": fields}, ("field",))
    encode = EncodeFlow(model.flow)
    parts = Parts(
        name="motion-i2v-demo",
        stage1=widened(model.predict, 1),
        stage2=widened(model.render, 0),
        drawn=widened(model.control, 1),
        text=Network(Texts(model.text_encoder, model.motion_text).eval()),
        text_size=(demo.TEXT_TOKENS, 2 * demo.TEXT_WIDTH),
        vocabulary=demo.VOCABULARY,
        tokenizer=TokenizerText(words.to_str(), demo.TEXT_TOKENS, demo.PAD),
        encode=Network(Encode(model.vae).eval()),
        sparse=Network(Sparse(encode).eval()),
        fields=Decoding({"decode_field": moved}),
        decoding=Decoding({"decode": decode}),
        latents=demo.LATENTS,
        scale=demo.SIZE // demo.LATENTS[-1],
        schedules={
            MOTION: schedules(alphas, prediction, GUIDANCE, STEPS)[0],
            VIDEO: schedules(alphas, prediction, 1.0, STEPS, to_the_end=True)[1],
        },
        seen=BOTH,
        guidance=(GUIDANCE, None),
        unit=UNIT,
        default=DEFAULT,
        provenance={"checkpoint": sha256_of(checkpoint)},
    )
    return with_memory(motion_system(parts), parts, Retrieval(packaged_encoder(), Network(Keep(encode).eval()), alphas))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE / "checkpoint.safetensors")
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "bundle")
    arguments = parser.parse_args()
    export_system(demo_system(arguments.checkpoint), arguments.out, say=print)
