"""Models without weights: counts of the released sizes, and programs that equal the plain step once weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import CogVideoXTransformer3DModel, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from motionrt.benchmarks.counts import COGVIDEOX, MOTION, UNET  # noqa: E402
from motionrt.benchmarks.models.released import released_partition  # noqa: E402
from motionrt.export.compiler.partition import Partition  # noqa: E402
from motionrt.export.compiler.weightless import fake_partition, leaves, materialise, weights_by_class  # noqa: E402
from motionrt.export.systems import cogvideox_step as cogvideox  # noqa: E402
from motionrt.export.systems import svd_step as svd  # noqa: E402
from motionrt.export.systems.motionrag import MotionAdapterCrossAttention, install_cogvideox_adapter  # noqa: E402
from motionrt.export.systems.steps import OUTPUTS, cogvideox_step, step_args  # noqa: E402


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: diffusers begins some of them at 0 or 1, which hides faults."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
    return module.eval()


def filled(args: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    feed = {name: torch.randn(value.shape, generator=draw) for name, value in args.items()}
    feed["timestep"] = torch.tensor([0.4]) if args["timestep"].is_floating_point() else torch.tensor([500])
    return feed | {"guidance": torch.tensor([2.5]), "motion_scale": torch.tensor([0.7])}


def run(cut: Partition, feed: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
    """The programs of a fake partition with the weights of `state`, one buffer at a time."""
    env = dict(feed)
    for program in cut.programs.values():
        for name in program.weights:
            setattr(program.module, name, materialise(cut, program, name, state.get))
        with torch.no_grad():
            env.update(zip(program.outputs, program.module(*(env[n] for n in program.inputs)), strict=True))
    return [env[name] for name in cut.step.outputs]


def equal(got: list[Tensor], want: Any) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(2, id="another grid: sine-cosine table", marks=pytest.mark.slow),
        pytest.param(3, id="native grid: learned table", marks=pytest.mark.slow),
    ],
)
def test_cogvideox_programs_without_weights_equal_the_step_once_they_are_read(
    frames: int, tiny_partitions: Callable[[str], tuple[Partition, Tensor]]
) -> None:
    latents = (frames, 4, 6, 8)
    torch.manual_seed(0)
    transformer: Any = CogVideoXTransformer3DModel(**COGVIDEOX)
    install_cogvideox_adapter(transformer, MOTION[1])
    randomise(transformer)
    transformer.patch_embed.pos_embedding.copy_(torch.randn_like(transformer.patch_embed.pos_embedding))
    native, tokens = tiny_partitions("cogvideox tiny")
    args = step_args(cogvideox.INPUTS, COGVIDEOX, latents, MOTION)
    feed = filled(args)
    rope = cogvideox.rotary_tables(transformer.config, frames, 6, 8)
    with torch.no_grad():  # diffusers' own forward, positions chosen by itself
        both = torch.cat([feed["latents"], feed["image_latents"]], dim=2).repeat(2, 1, 1, 1, 1)
        v = transformer(
            both, torch.cat([feed["negative_text"], feed["text"]]), torch.tensor([500, 500]), image_rotary_emb=rope,
            attention_kwargs={"motion": torch.cat([tokens, feed["motion"]]), "motion_scale": feed["motion_scale"]},
            return_dict=False,
        )[0]  # fmt: skip
        guided = v[:1] + feed["guidance"] * (v[1:] - v[:1])
        c = feed["coefficients"][0]
        x0 = c[0] * feed["latents"] + c[1] * guided
        want = [c[2] * feed["latents"] + c[3] * x0 + c[4] * feed["previous_x0"] + c[5] * feed["noise"], x0]
    cut = native
    if frames != 3:
        step = cogvideox_step(COGVIDEOX, latents=latents, motion=MOTION, unconditional=tokens)
        cut = fake_partition(step, tuple(args.values()), cogvideox.INPUTS, outputs=OUTPUTS)
    state = {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
    equal(run(cut, feed, state), want)
    learned = {n for p in cut.programs.values() for node in p.weights.values() for n in leaves(node)}
    assert ("transformer.patch_embed.pos_embedding" in learned) == (frames == 3)


def test_positions_can_be_the_beginning_of_the_learned_table() -> None:
    step: Any = cogvideox_step(COGVIDEOX, latents=(2, 4, 6, 8), motion=MOTION, positions="learned")
    assert step.transformer.patch_embed._get_positional_embeddings().shape == (1, 5 + 2 * 3 * 4, 64)
    with pytest.raises(ValueError, match="positions is 'other'"):
        cogvideox_step(COGVIDEOX, latents=(2, 4, 6, 8), motion=MOTION, positions="other")


@pytest.mark.slow
def test_svd_programs_without_weights_equal_diffusers_unet_with_plain_adapters(
    tiny_partitions: Callable[[str], tuple[Partition, Tensor]],
) -> None:
    unet: Any = UNetSpatioTemporalConditionModel(**UNET)
    svd.install_svd_adapter(unet, MOTION[1])
    randomise(unet)
    frames, latents = 3, (3, 4, 8, 16)
    cut, tokens = tiny_partitions("svd tiny")
    args = step_args(svd.INPUTS, UNET, latents, MOTION)
    feed = filled(args)
    state = {f"unet.{name}": value.clone() for name, value in unet.state_dict().items()}

    motion = torch.cat([tokens, feed["motion"]])
    for _, attention in svd.spatial_attentions(unet):  # the released processors, with the tokens handed to them here
        plain = attention.processor
        assert type(plain) is MotionAdapterCrossAttention
        call = type("Handed", (MotionAdapterCrossAttention,), {
            "__call__": lambda self, *a, **k: MotionAdapterCrossAttention.__call__(
                self, *a, **k, motion=motion, motion_scale=feed["motion_scale"])
        })  # fmt: skip
        plain.__class__ = call
    image = feed["image_latents"][:, None].expand(-1, frames, -1, -1, -1)
    images, context = torch.cat([torch.zeros_like(image), image]), feed["image_context"]
    sample = torch.cat([feed["latents"].repeat(2, 1, 1, 1, 1), images], dim=2)
    ids = torch.tensor([[6.0, 127.0, 0.02]] * 2)
    with torch.no_grad():
        v = unet(sample, feed["timestep"], torch.cat([torch.zeros_like(context), context]), ids, return_dict=False)[0]
    scale = torch.linspace(1.0, 2.5, frames).view(1, -1, 1, 1, 1)  # per-frame guidance as in diffusers' pipeline
    guided = v[:1] + scale * (v[1:] - v[:1])
    c = feed["coefficients"][0]
    x0 = c[0] * feed["latents"] + c[1] * guided
    want = [c[2] * feed["latents"] + c[3] * x0 + c[4] * feed["previous_x0"] + c[5] * feed["noise"], x0]
    equal(run(cut, feed, state), want)

    # all cross-attentions leave the loop; what they are asked with is not even computed; frame positions are constants
    step_reads = {name for node in cut.step.weights.values() if node.op == "get_attr" for name in leaves(node)}
    read = step_reads | {n for p in (cut.request, cut.schedule) for node in p.weights.values() for n in leaves(node)}
    assert not [name for name in step_reads if ".attn2." in name or "time_emb" in name or "time_pos_embed" in name]
    for dead in (".attn2.to_q.", ".attn2.to_k.", "transformer_blocks.0.norm2."):
        assert not [name for name in read if dead in name], dead
    rows = {h.name: h.shape for h in cut.hoisted}
    places = len(list(svd.spatial_attentions(unet))) + len(list(svd.temporal_attentions(unet)))
    assert sum(shape[:2] == (2, 1) and len(shape) == 3 for shape in rows.values()) == places == 8
    tables = [h for h in cut.hoisted if h.kind == "schedule"]
    widths = [part.time_emb_proj.out_features for part in unet.modules() if getattr(part, "time_emb_proj", None) is not None]
    assert sum(np.prod(h.shape) for h in tables) == sum(widths)  # one row for all frames and both samples


def test_euler_rows_follow_diffusers_scheduler_with_karras_sigmas() -> None:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
    )
    for steps in (1, 2, 25):
        timesteps, rows = svd.euler_rows(scheduler, steps)
        scheduler.set_timesteps(steps)
        assert np.array_equal(timesteps, scheduler.timesteps.numpy()) and np.isfinite(rows).all()
        torch.manual_seed(0)
        unit = torch.randn(40, dtype=torch.float64)
        sample, ours = unit * float(scheduler.init_noise_sigma), unit.clone()
        for t, row in zip(scheduler.timesteps, torch.from_numpy(rows).double(), strict=True):
            torch.testing.assert_close(ours, scheduler.scale_model_input(sample, t), atol=1e-4, rtol=1e-4)
            v = torch.randn(40, dtype=torch.float64)
            result = scheduler.step(v, t, sample)
            x0 = row[0] * ours + row[1] * v
            torch.testing.assert_close(x0, result.pred_original_sample.double(), atol=1e-3, rtol=1e-4)
            ours, sample = row[2] * ours + row[3] * x0, result.prev_sample.double()
        torch.testing.assert_close(ours, sample, atol=1e-4, rtol=1e-4)  # at sigma 0 they are the same
    with pytest.raises(ValueError, match="timestep_type is 'discrete'"):
        svd.euler_rows(EulerDiscreteScheduler(prediction_type="v_prediction"), 4)
    with pytest.raises(TypeError, match="DDIM"):
        svd.euler_rows(cogvideox_scheduler(), 4)


def cogvideox_scheduler() -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler()


@pytest.mark.slow
def test_partition_of_cogvideox_at_full_width_counts_the_released_weights() -> None:
    # two of 42 blocks; all of them, and SVD, are rows of benchmarks/models/partition_report.py
    sizes = weights_by_class(released_partition("cogvideox-5b-i2v", frames=17, layers=2))
    block = 2 * (512 * 18432 + 18432)
    ends = (3072 * 512 + 512) + (512 * 512 + 512) + (512 * 6144 + 6144)
    assert sizes["schedule"].parameters == 2 * block + ends
    assert 42 * block + ends == 799_259_648  # specs/motionrag.md B3
    assert sizes["request"].parameters == 2 * (3072 * 3072 + 2 * 3072 * 1024) + 4096 * 3072 + 3072
    assert sizes["dead"].parameters == sizes["constant"].parameters == 0
    # the adapter in the loop: L 6976, 25 tokens, hA and PV, batch 2 (B2: 52.5 GFLOP per layer and sample)
    plain = 2 * 2 * (91_491e9 / 42)
    assert sizes["step"].flops == pytest.approx(plain + 2 * 2 * 52.5e9, rel=2e-3)
