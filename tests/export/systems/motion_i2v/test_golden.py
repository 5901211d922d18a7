"""Motion-I2V's networks and loops against numbers of the released modules (tests/golden/motion_i2v), and what must hold.

Tolerance as its README says, of the largest number: 1e-4 for a pass, 5e-4 for a loop (random weights do not denoise: its
latents grow to 90), 1e-3 for both loops in turn.
"""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from by_path import load_by_path  # noqa: E402
from torch import Tensor  # noqa: E402

from motionrt.export.systems.motion_i2v.augmented import Tables, Warp, attended, fields_of  # noqa: E402
from motionrt.export.systems.motion_i2v.fields import DecodeFields, Held, Mean, coarse, field_of, picture_of  # noqa: E402
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet  # noqa: E402
from motionrt.export.systems.motion_i2v.passes import output  # noqa: E402
from motionrt.export.systems.motion_i2v.rows import FLOW, rows, timesteps  # noqa: E402
from motionrt.export.systems.motion_i2v.stencil import resized, stencil, warped  # noqa: E402
from motionrt.export.systems.motion_i2v.step import DrawnStep, FlowStep, VideoStep  # noqa: E402
from motionrt.export.systems.motionclone.frames import DecodeFrames  # noqa: E402
from motionrt.export.systems.motionclone.rows import noise_schedule  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/motion_i2v_models.py")
golden, turned = models.golden, models.turned
ALPHAS, PREDICTION = noise_schedule(models.config("scheduler"))
ROWS = torch.from_numpy(rows(5, ALPHAS, PREDICTION))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest number."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.fixture(scope="module")
def stage1() -> FlowUNet:
    return models.stage1()


@pytest.fixture(scope="module")
def drawn() -> Trajectories:
    return models.drawn()


@pytest.fixture(scope="module")
def stage2() -> VideoUNet:
    return models.stage2()


def given() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image, latents of fields, timestep, strides and text of the golden pass of stage 1: two requests."""
    io = golden("stage1_forward")
    sample = turned(io["sample"])
    image, latents = sample[:, 0, :4], sample[:, :, 4:]
    assert torch.equal(sample[:, :, :4], image[:, None].expand(-1, 15, -1, -1, -1))
    return image, latents, io["timestep"].expand(2), io["stride"].float().expand(2, -1), io["text"]


def moving() -> Tensor:
    """The golden fields `[1, 15, 2, 64, 128]`."""
    return golden("flow")["flow"][None, 1:]


# --- the splat as a gather ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["zero", "integer_shift", "fraction_border", "all_out", "contract_expand", "random", "nonfinite"]
)
def test_gather_is_the_released_splat(case: str) -> None:
    io = golden("splat")
    features, wanted = io[f"{case}.feat"], io[f"{case}.avg"]
    table = stencil(io[f"{case}.flow"][:, None])
    found = warped(table, features.flatten(2).transpose(1, 2))[:, :, 0].transpose(1, 2).reshape(wanted.shape)
    close(found, wanted, 1e-6)


def splat(flow: Tensor, features: Tensor) -> Tensor:
    """The averaging splat by its formula, in float64: `flow [B, n, 2, h, w]`, `features [B, h w, D]` -> `[B, h w, n, D]`."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    to_x, to_y = ((at + part.double()).flatten(2)[:, :, None] for at, part in ((x, flow[:, :, 0]), (y, flow[:, :, 1])))
    near = [(1 - (at.flatten()[:, None] - to).abs()).clamp(min=0) for at, to in ((x, to_x), (y, to_y))]
    weights = near[0] * near[1]
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-7)
    return torch.einsum("bipq,bqd->bpid", weights, features.double())


@pytest.mark.parametrize("shape", [(8, 16), (5, 8), (1, 2), (7, 3)], ids=str)
@pytest.mark.parametrize("kind", ["random", "zoom out", "one point", "one source each"])
def test_gather_leaves_nothing_out_however_many_come_to_one_place(shape: tuple[int, int], kind: str) -> None:
    height, width = shape
    draw = torch.Generator().manual_seed(5)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    noise = torch.rand(2, 3, 2, height, width, generator=draw)
    flow = {
        "random": 6 * noise - 3,
        "zoom out": torch.stack([-0.6 * x, -0.6 * y]) + 0.3 * noise,
        "one point": torch.stack([0.3 * width - x, 0.6 * height - y]) + 0.2 * noise,
        "one source each": (3 * noise).round(),
    }[kind]
    features = torch.randn(2, height * width, 5, generator=draw)
    torch.testing.assert_close(warped(stencil(flow), features).double(), splat(flow, features), atol=1e-5, rtol=0)


def test_the_tree_has_room_for_the_worst_field() -> None:
    """Targets of 5, 9 or 21 sources each need the most chunks of a level: a whole picture of them."""
    from motionrt.export.systems.motion_i2v.stencil import SLOTS, _Chunks, _room

    rows = 4 * 9 * 21
    for level, count in ((1, SLOTS + 1), (1, 2 * SLOTS + 1), (2, 2 * SLOTS + 1), (3, SLOTS + SLOTS**2 + 1)):
        chunks = -(-(count - SLOTS) // SLOTS)
        for _ in range(level - 1):
            chunks = -(-chunks // SLOTS)
        assert (4 * rows // count) * chunks < _room(rows, level)  # and one that is empty
    assert _Chunks(torch.tensor([rows]), torch.tensor([0]), torch.zeros(rows, dtype=torch.int64), 3).owner.eq(rows).all()


# --- the augmented attention ----------------------------------------------------------------------------------------


def attention(stage2: VideoUNet, case: str, form: str, flow: Tensor, fused: bool) -> Tensor:
    """The golden attention of `case` for its hidden states."""
    block, layer, grid, attn = {"A": (0, 0, (8, 16), "attn1"), "B": (1, 1, (4, 8), "attn2")}[case]
    module = stage2.unet.down_blocks[block].motion_modules[layer].transformer_blocks[0]
    hidden = golden("aug_attention")[f"{case}.hidden"].unflatten(0, (-1, 16)).transpose(1, 2)
    tables = {grid[0] * grid[1]: fields_of(flow, [grid])[0]}
    found = attended(getattr(module, attn), hidden, module.pos_embed.pe, Warp(tables, 16, 1, form, fused))
    return found.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "as the op"])
def test_augmented_attention_is_the_released_one(stage2: VideoUNet, fused: bool) -> None:
    io = golden("aug_attention")
    flow = io["A.flow"][None, 1:]
    close(resized(flow, (8, 16)), io["A.flow_scaled"][:, 1:], 1e-6)
    close(attention(stage2, "A", "own", flow, fused), io["A.out"], 1e-5)
    close(attention(stage2, "A", "own", 0 * flow, fused), io["A.out_zero_flow"], 1e-5)
    for form in ("own", "released"):
        close(attention(stage2, "B", form, flow, fused), io[f"B.out_{form}"], 1e-5)
    assert (io["B.out_own"] - io["B.out_released"]).abs().max() > 0.1  # the forms can be told apart


def test_frame_0_arrives_as_the_release_warps_it() -> None:
    io = golden("aug_attention")
    flow = io["A.flow"][None, 1:]
    for case, grid, form in (("A", (8, 16), ""), ("B", (4, 8), "_own"), ("B", (4, 8), "_released")):
        tables = {grid[0] * grid[1]: fields_of(flow, [grid])[0]}
        first = io[f"{case}.hidden"].unflatten(0, (-1, 16))[:, 0]
        found = Warp(tables, 16, 1, form.removeprefix("_") or "own")(first)
        close(found.permute(0, 2, 3, 1).flatten(0, 1), io[f"{case}.warped{form}"].flatten(2), 1e-5)


def test_a_field_of_zeros_repeats_frame_0() -> None:
    features = torch.randn(1, 128, 6, generator=torch.Generator().manual_seed(2))
    (table,) = fields_of(torch.zeros(1, 15, 2, 64, 128), [(8, 16)])
    torch.testing.assert_close(warped(table, features), features[:, :, None].expand(-1, -1, 15, -1), atol=1e-6, rtol=1e-6)


# --- passes of the networks -----------------------------------------------------------------------------------------


def test_stage_1_is_the_released_one(stage1: FlowUNet) -> None:
    image, latents, time, strides, text = given()
    io = golden("stage1_forward")
    close(stage1.embedded(time, strides), io["emb"])
    close(turned(stage1(image, latents, time, strides, text)), io["out"])


def test_the_controlnet_is_the_released_one(stage1: FlowUNet, drawn: Trajectories) -> None:
    io = golden("controlnet_forward")
    hint = turned(io["hint"])
    close(drawn.controlnet_cond_embedding(hint)[:, 0], io["hint_embedding_f0"])
    found = [turned(value.unflatten(0, (2, 15))) for value in drawn(*given(), hint)]
    for index, value in enumerate(found[:-1]):
        wanted = io[f"residual_{index:02d}"]
        close(value[:1, :, :: 2 if wanted.shape[2] == 8 else 1], wanted)
    close(found[-1], io["residual_mid"])
    for scale, name in ((1.0, "out_with_control"), (0.5, "out_with_control_scale0.5")):
        close(turned(stage1(*given(), drawn(*given(), hint, scale))), io[name])


def test_branches_of_guidance_share_what_does_not_read_the_text(stage1: FlowUNet, drawn: Trajectories) -> None:
    image, latents, time, strides, text = given()
    hint = turned(golden("controlnet_forward")["hint"])
    one = (image[:1], latents[:1], time[:1], strides[:1], text)
    twice = [value[:1].expand(2, *value.shape[1:]) for value in (image, latents, time, strides)]
    found = stage1(*one, drawn(*one, hint[:1]))
    close(found, stage1(*twice, text, drawn(*twice, text, hint[:1].expand(2, -1, -1, -1, -1))))


def rendered(net: VideoUNet, text: Tensor, flow: Tensor) -> Tensor:
    """The golden pass of stage 2 with all its frames, `[B g, 4, 16, h, w]`."""
    io = golden("stage2_forward")
    sample = turned(io["sample"])
    found = net.hidden(sample[:, 0], sample[:, 1:], io["timestep"].expand(1), text, fields_of(flow, net.grids(8, 16)))
    return turned(output(net.unet, found.flatten(0, 1)).unflatten(0, (-1, 16)))


def test_stage_2_is_the_released_one(stage2: VideoUNet) -> None:
    io, flow = golden("stage2_forward"), moving()
    negative, prompt = (rendered(stage2, io["text"][i : i + 1], flow) for i in range(2))
    close(negative, io["out_batch1_negative"])
    close(prompt, io["out_batch1_prompt"])
    close(rendered(stage2, io["text"], flow), torch.cat([negative, prompt]))  # both at once
    close(rendered(stage2, io["text"][1:], 0 * flow), io["out_batch1_prompt_zero_flow"])
    close(rendered(models.stage2("released"), io["text"], flow), io["out_batch2_released"])
    assert (io["out_batch2_released"][1] - io["out_batch1_prompt"][0]).abs().max() > 0.1


@pytest.mark.slow
def test_requests_do_not_mix_in_a_batch(stage2: VideoUNet) -> None:
    io, flow = golden("stage2_forward"), moving()
    sample = turned(io["sample"])
    two, flows = torch.cat([sample, sample.flip(1)]), torch.cat([flow, 0.5 * flow.flip(1)])
    time = torch.tensor([601.0, 201.0])
    tables = fields_of(flows, stage2.grids(8, 16))
    found = stage2(two[:, 0], two[:, 1:], time, io["text"], tables)
    close(stage2(two[:, 0], two[:, 1:], time, io["text"], tables, fused=True), found)
    for b in range(2):
        one = slice(b, b + 1)
        fields = fields_of(flows[one], stage2.grids(8, 16))
        close(found[one], stage2(two[one, 0], two[one, 1:], time[one], io["text"][one], fields))


def test_nothing_noisy_reaches_frame_0_before_the_first_motion_module(stage2: VideoUNet) -> None:
    """What enters it of frame 0 is the same at another time, with other latents: bit for bit."""
    io, seen = golden("stage2_forward"), list[Tensor]()
    sample, fields = turned(io["sample"]), fields_of(moving(), stage2.grids(8, 16))
    attention = stage2.unet.down_blocks[0].attentions[0]
    hook = attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    for time, latents in ((601.0, sample[:, 1:]), (41.0, torch.randn(1, 15, 4, 8, 16))):
        stage2(sample[:, 0], latents, torch.tensor([time]), io["text"][:1], fields)
    hook.remove()
    first, others, first_again, others_again = seen
    assert torch.equal(first, first_again) and (others - others_again).abs().max() > 0.1


# --- fields ---------------------------------------------------------------------------------------------------------


def test_the_autoencoder_of_fields_is_the_released_one() -> None:
    io, vae = golden("vae_flow_io"), models.flow_vae()
    scale = vae.config.scaling_factor
    assert scale == 0.18215
    close(Mean(vae)(io["flow01"]), io["mean"])
    pixels = (2 * io["decoded"] - 1).clamp(-1, 1) * torch.tensor([128.0, 64.0])[:, None, None]
    close(DecodeFields(DecodeFrames(vae))(scale * io["latent"][None])[0], pixels)


def test_fields_become_pictures_and_back_as_in_the_release() -> None:
    io = golden("drags")
    wanted = turned(io["norm.flow_01"])[0]
    close(picture_of(turned(io["norm.flow_px"])[0]), wanted, 1e-6)
    found = Held()(field_of(turned(io["denorm.decoded"])), io["denorm.brush"][0])
    close(found[0], io["denorm.flow_pre"][1:], 1e-6)


# --- both loops -----------------------------------------------------------------------------------------------------


def of_fields(stage1: FlowUNet, drawn: Trajectories, noise: Tensor, control: Tensor | None) -> Tensor:
    """Latents of fields after each of the five steps, `[5, 4, 15, h, w]`."""
    io, latents, found = golden("stage1_loop"), turned(noise), []
    strides = io["stride"].float()
    for row in ROWS:
        numbers = (row[None, 3:5], stage1.times(row[1:2], strides), io["image_latent_scaled"], io["text"][1:])
        guidance = (row[2:3], io["text"][:1])
        if control is None:
            latents = FlowStep(stage1)(latents, *numbers, *guidance)
        else:
            own = (drawn.times(row[1:2], strides), turned(control))
            latents = DrawnStep(stage1, drawn)(latents, *numbers, *own, *guidance)
        found.append(latents)
    return turned(torch.cat(found))


def of_video(net: VideoUNet, noise: Tensor, moves: Tensor, brush: Tensor, fused: bool = False) -> Tensor:
    """Latents of the pictures behind the first after each of the five steps, `[5, 4, 15, h, w]`."""
    io, start, found = golden("stage2_loop"), turned(noise)[:, 1:], []
    latents, step, tables = start, VideoStep(net, fused), Tables(net.grids(8, 16))(moves)
    for row in ROWS:
        conditions = (io["image_latent_scaled"], brush, io["text"][1:], start, *tables)
        latents = step(latents, row[None, 3:], row[1:2], *conditions, row[2:3], io["text"][:1])
        found.append(latents)
    return turned(torch.cat(found))


def test_timesteps_are_the_released_ones() -> None:
    assert timesteps(25).tolist() == list(range(961, 0, -40)) and timesteps(5).tolist() == [801, 601, 401, 201, 1]
    assert rows(5, ALPHAS)[:, : len(FLOW)].shape == (5, 5)


@pytest.mark.slow
def test_the_loop_of_fields_is_the_released_one(stage1: FlowUNet, drawn: Trajectories) -> None:
    io = golden("stage1_loop")
    close(of_fields(stage1, drawn, io["start_noise"], None), io["nocontrol.latents"], 5e-4)
    found = of_fields(stage1, drawn, io["start_noise"], io["control"])
    close(found, io["control.latents"], 5e-4)
    decoded = DecodeFields(DecodeFrames(models.flow_vae()))(turned(found[4:]))[:, 14]
    close(decoded, field_of(io["control.decoded_target_14"]), 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["own", "released"])
@pytest.mark.parametrize("fused", [False, True], ids=["written out", "as the op"])
def test_the_loop_of_the_video_is_the_released_one(form: str, fused: bool) -> None:
    io, net = golden("stage2_loop"), models.stage2(form)
    brush = io["brush"][:, 0].float()
    assert torch.equal(coarse(brush, 8), io["brush_latent"][:, 0].float())
    for name, held in ((form, 0 * brush), (f"{form}_brush", brush)):
        close(of_video(net, io["start_noise"], moving(), held, fused), io[f"{name}.latents"][:, :, 1:], 5e-4)


@pytest.mark.slow
def test_both_loops_in_turn_are_the_released_ones(stage1: FlowUNet, drawn: Trajectories) -> None:
    io = golden("end_to_end")
    brush, mask = (io[name][None, None].float() for name in ("brush", "mask"))
    assert torch.equal(turned(io["control"])[0, :, 4], coarse(mask, 8)[0].expand(15, -1, -1))
    latents = of_fields(stage1, drawn, io["start_noise_1"], io["control"])[4:]
    close(latents, io["stage1_latents_final"], 1e-3)
    moves = Held()(DecodeFields(DecodeFrames(models.flow_vae()))(turned(latents)), brush)
    close(moves[0, [0, 7, 14]], io["flow_pre_0_1_8_15"][1:], 1e-3)
    found = of_video(models.stage2("released"), io["start_noise_2"], moves, brush)
    close(found[:1], io["stage2_latents_step0_released"][:, :, 1:], 1e-3)
    close(found[4:], io["stage2_latents_final_released"][:, :, 1:], 1e-3)
