"""Motion-I2V's networks and files at the size of its golden numbers (tests/golden/motion_i2v)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from by_path import load_by_path
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from motionrt.export.checkpoints.animatediff_files import released_name
from motionrt.export.systems.decoding import decoding
from motionrt.export.systems.motion_i2v.fields import DecodeFields, Mean, Sparse
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet
from motionrt.export.systems.motion_i2v.rows import schedules
from motionrt.export.systems.motion_i2v.system import MOTION, VIDEO, Parts
from motionrt.export.systems.motionclone.frames import DecodeFrames, EncodeImage
from motionrt.export.systems.motionclone.rows import noise_schedule
from motionrt.export.systems.system import Array, Graph, Network, TokenizerText

HELPERS = Path(__file__).resolve().parents[2] / "tests/helpers"
tiny, animatediff = load_by_path(HELPERS / "tiny_models.py"), load_by_path(HELPERS / "animatediff_models.py")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "motion_i2v"


def golden(name: str) -> dict[str, Tensor]:
    """Tensors of a golden file; weights and fields, which are stored as float16, as float32."""
    found = load_file(GOLDEN / f"{name}.safetensors")
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in found.items()}


def config(name: str) -> dict[str, Any]:
    """Settings of a golden network."""
    return json.loads((GOLDEN / f"{name}_config.json").read_text())


def turned(x: Tensor) -> Tensor:
    """`[B, C, F, h, w]`, as the release has it, to `[B, F, C, h, w]` or back."""
    return x.transpose(1, 2)


def loaded(network: Any, file: str, prefix: str = "") -> Any:
    """`network` with the weights of a golden file: all of them, but for the tables of positions."""
    stored = golden(file)
    names = [name for name in network.state_dict() if not name.endswith("pos_embed.pe")]
    state = {name: stored.pop(prefix + released_name(name.removeprefix("unet."))) for name in names}
    assert all(key.endswith("pos_encoder.pe") for key in stored)
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False)


def stage1() -> FlowUNet:
    """Stage 1."""
    return loaded(FlowUNet(config("stage1_unet")), "stage1_unet")


def drawn() -> Trajectories:
    """The ControlNet."""
    return loaded(Trajectories(config("controlnet")), "controlnet", "controlnet.")


def stage2(form: str = "own") -> VideoUNet:
    """Stage 2."""
    return loaded(VideoUNet(config("stage2_unet"), form), "stage2_unet")


def flow_vae() -> nn.Module:
    """The autoencoder of fields."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**config("vae_flow"))
    names = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    state = golden("vae_flow")
    for theirs, ours in names:
        state = {key.replace(f".attentions.0.{theirs}.", f".attentions.0.{ours}."): value for key, value in state.items()}
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)


# The smallest that a step can be traced of in seconds: two levels, three fields
FRAMES, SIZE, TOKENS = 4, 16, animatediff.TOKENS
SMALL: dict[str, Any] = {
    "sample_size": SIZE,
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": animatediff.WIDTH,
    "num_attention_heads": 4, "motion_num_attention_heads": 4, "motion_max_seq_length": 32,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}  # fmt: skip
STEPS = 3


class Words(nn.Module):
    """Ids `[B, L]` to a text `[B, L, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, SMALL["cross_attention_dim"])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def small_vae(channels: int, seed: int) -> nn.Module:
    """An autoencoder whose latents are half as large as its pictures."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=channels, out_channels=channels, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), latent_channels=4, layers_per_block=1,
        norm_num_groups=2, scaling_factor=0.5,
    )  # fmt: skip
    return tiny.randomise(vae, seed)


def small_parts(form: str = "own", guidance: tuple[float | None, float | None] = (3.0, 2.0), **changes: Any) -> Parts:
    """Parts of a system with random weights, in memory: four frames of 16 x 16 pixels, three steps."""
    alphas, prediction = noise_schedule(config("scheduler"))
    image, fields = small_vae(3, 1), small_vae(2, 2)
    latents = (FRAMES, 4, SIZE // 2, SIZE // 2)
    decode = Graph(Network(DecodeFrames(image).eval()), {"latents": Array((1, *latents))}, ("video",))
    motion = Graph(
        Network(DecodeFields(DecodeFrames(fields)).eval()), {"motion_latents": Array((1, 1, *latents[1:]))}, ("field",)
    )
    each = [schedules(alphas, prediction, scale or 1.0, (STEPS,)) for scale in guidance]
    words = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 40)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {
        "name": "motion-i2v-small",
        "stage1": tiny.randomise(FlowUNet({**SMALL, "in_channels": 8}), 3),
        "stage2": tiny.randomise(VideoUNet({**SMALL, "in_channels": 4}, form), 4),
        "drawn": tiny.randomise(Trajectories({**SMALL, "in_channels": 8, "conditioning_hidden_channels": 6}), 5),
        "sparse": Network(Sparse(Mean(fields)).eval()),
        "text": Network(tiny.randomise(Words(), 6)),
        "text_size": (TOKENS, SMALL["cross_attention_dim"]),
        "vocabulary": 40,
        "tokenizer": TokenizerText(tokenizer.to_str(), TOKENS),
        "encode": Network(EncodeImage(image).eval()),
        "fields": decoding(
            {"decode_field": motion}, [(1, 1)] * (FRAMES - 1), (FRAMES - 1, *latents[1:]), 2, name="fields", channels=2
        ),
        "decoding": decoding({"decode": decode}, [(FRAMES, FRAMES)], latents, 2),
        "latents": latents,
        "scale": 2,
        "schedules": {MOTION: each[0][0], VIDEO: each[1][1]},
        "guidance": guidance,
        "unit": 2,
        "default": STEPS,
    }
    return Parts(**{**settings, **changes})


@dataclass(frozen=True)
class Released:
    """A folder `models` in the released layout, and its networks in memory, with the same random weights."""

    models: Path
    stage1: FlowUNet
    drawn: Trajectories
    stage2: VideoUNet
    vae: Any
    flow_vae: Any


def released_files(folder: Path, form: str = "own") -> Released:
    """Files of two levels; text and Stable Diffusion are those of `animatediff_models.SMALL`."""
    vae, flow_vae = small_vae(3, 1), small_vae(2, 2)
    made = Released(
        folder / "models",
        tiny.randomise(FlowUNet({**SMALL, "in_channels": 8}), 3),
        tiny.randomise(Trajectories({**SMALL, "in_channels": 8, "conditioning_hidden_channels": 6}), 5),
        tiny.randomise(VideoUNet({**SMALL, "in_channels": 4}, form), 4),
        vae,
        flow_vae,
    )
    flow, tuned = made.models / "stage1/StableDiffusion-FlowGen", made.models / "stage2/DreamBooth_LoRA"
    for inside in (flow / "unet", flow / "controlnet", flow / "vae", flow / "vae_flow", made.models / "stage2/Motion_Module"):
        inside.mkdir(parents=True)
    tuned.mkdir(parents=True)
    torch.save(released_state(made.stage1), flow / "unet/diffusion_pytorch_model.bin")
    drawn = {f"controlnet.{key}": value for key, value in released_state(made.drawn).items()}
    torch.save(drawn, flow / "controlnet/controlnet.bin")
    still, moving = animatediff.split(released_state(made.stage2))
    torch.save(moving, made.models / "stage2/Motion_Module/motion_block.bin")
    torch.save(still, tuned / "realistic_unet.ckpt")
    base = made.models / "stage2/StableDiffusion"
    animatediff.write_base(base, still, animatediff.SMALL, (4, 8))
    for name, module, where in (("vae", vae, base), ("vae_flow", flow_vae, flow)):
        module.save_pretrained(folder / name)
        config = (folder / name / "config.json").read_text()
        (where / "vae/config.json").write_text(config)
    torch.save(flow_vae.state_dict(), flow / "vae_flow/diffusion_pytorch_model.bin")
    save_file(compvis_state(vae), tuned / "realisticVisionV51_v20Novae.safetensors")
    return made


def released_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights of one of the networks by their released names, with the tables of positions."""
    found = {}
    for name, value in network.state_dict().items():
        key = released_name(name.removeprefix("unet."))
        if key.endswith(".pos_embed.pe"):
            block = key.removesuffix(".pos_embed.pe")
            found |= {f"{block}.attention_blocks.{i}.pos_encoder.pe": value.clone() for i in range(2)}
        else:
            found[key] = value
    return found


def compvis_state(vae: nn.Module) -> dict[str, Tensor]:
    """An autoencoder of two levels, one layer each, as CompVis' code names it, among keys that are no part of it."""
    pairs = [("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1")]
    ups = [(f"up.{1 - i}.block.{j}", f"up_blocks.{i}.resnets.{j}") for i in range(2) for j in range(2)]
    downs = [(f"down.{i}.block.0", f"down_blocks.{i}.resnets.0") for i in range(2)]
    sides = {
        "encoder": [*downs, ("down.0.downsample", "down_blocks.0.downsamplers.0")],
        "decoder": [*ups, ("up.1.upsample", "up_blocks.0.upsamplers.0")],
    }
    attention = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]
    ours = dict(vae.state_dict())
    found = {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    for side, more in sides.items():
        every = [*pairs, *more, *((f"mid.attn_1.{a}", f"mid_block.attentions.0.{b}") for a, b in attention)]
        for theirs, name in [*every, ("norm_out", "conv_norm_out"), ("conv_in", "conv_in"), ("conv_out", "conv_out")]:
            start = f"{side}.{name}."
            for key in [key for key in ours if key.startswith(start)]:
                value = ours.pop(key)
                value = value[..., None, None] if value.ndim == 2 else value
                tail = key.removeprefix(start).replace("conv_shortcut", "nin_shortcut")
                found[f"first_stage_model.{side}.{theirs}.{tail}"] = value.contiguous()
    return {**found, **{f"first_stage_model.{key}": value for key, value in ours.items()}}
