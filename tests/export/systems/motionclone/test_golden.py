"""MotionClone's network and steps against numbers of the released functions (tests/golden/motionclone), and what must hold.

Tolerance as its README says: 1e-4 + 1e-5 of the value in float32; indices exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from by_path import load_by_path  # noqa: E402
from diffusers import SparseControlNetModel  # noqa: E402
from torch import Tensor  # noqa: E402

from motionrt.export.checkpoints.animatediff_files import released_name  # noqa: E402
from motionrt.export.systems.motionclone.parts import Parts, motion_record  # noqa: E402
from motionrt.export.systems.motionclone.rows import COLUMNS, Recipe, noise_schedule, rows  # noqa: E402
from motionrt.export.systems.motionclone.sparse import Control, OfReferences, Sparse, residuals  # noqa: E402
from motionrt.export.systems.motionclone.step import (  # noqa: E402
    CHANGES,
    GUIDED,
    Extract,
    Fuse,
    GuidedStep,
    PlainStep,
    Represent,
    by_place,
    distance,
    fused,
)  # fmt: skip
from motionrt.export.systems.motionclone.unet import TappedUNet, motion_unet, prepared  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[4] / "tests/helpers/animatediff_models.py")
golden = models.golden
CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 16, 24, 32), "num_attention_heads": 4, "motion_num_attention_heads": 4, "norm_num_groups": 4,
    "cross_attention_dim": 20, "use_motion_mid_block": False,
}  # fmt: skip
SPARSE: dict[str, Any] = {
    "block_out_channels": (8, 16, 24, 32), "attention_head_dim": 4, "motion_num_attention_heads": 4, "norm_num_groups": 4,
    "cross_attention_dim": 20,
}  # fmt: skip
ALPHAS, _ = noise_schedule(models.SCHEDULER)
ROWS = torch.from_numpy(rows(Recipe(10, 5, 0.3, 100, 3, 3), ALPHAS))
LAYERS = [f"up_blocks.1.motion_modules.{i}.temporal_transformer.transformer_blocks.0.attention_blocks.{j}"
          for i in range(3) for j in range(2)]  # fmt: skip


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def turned(x: Tensor) -> Tensor:
    """`[B, C, F, h, w]`, as the release has it, to `[B, F, C, h, w]` or back."""
    return x.transpose(1, 2)


def loaded(network: Any, file: str) -> Any:
    """`network` with the weights of a golden file."""
    stored = golden(file)
    state = {name: stored[released_name(name)] for name in network.state_dict() if not name.endswith("pos_embed.pe")}
    assert len(state) == len(stored)
    network.load_state_dict(state, strict=False)
    return network.requires_grad_(False)


def tapped(group_norm: str = "per_frame", dtype: torch.dtype = torch.float32) -> TappedUNet:
    return TappedUNet(loaded(motion_unet(CONFIG, group_norm), "unet").to(dtype)).eval()


@pytest.fixture(scope="module")
def unet() -> TappedUNet:
    return tapped()


def extract(unet: TappedUNet, null_text: Tensor) -> Extract:
    return Extract(unet, null_text, 400, float(ALPHAS[400]), 1.0)


def stored_motion(file: str) -> tuple[Tensor, Tensor]:
    """Values and indices `[1, layers, P, N, F]` of a golden file."""
    found = golden(file)
    return tuple(torch.stack([found[f"{kind}.{layer}"][..., 0] for layer in LAYERS])[None] for kind in ("L", "tau"))  # type: ignore[return-value]


def motion_of(file: str) -> tuple[Tensor, Tensor]:
    """The motion that a step reads, of one golden reference."""
    values, indices = stored_motion(file)
    return fused(values[:, None], indices[:, None].long(), torch.ones(1, 1, 1), 16)


def step_inputs(*steps: tuple[int, Tensor, Tensor]) -> dict[str, Tensor]:
    """What a plain step reads of requests in the run: (index of the step, latents as the release has them, texts u and c)."""
    table = ROWS[[index for index, _, _ in steps]]
    named = dict(zip(COLUMNS, table.unbind(1), strict=True))
    return {
        "latents": turned(torch.cat([latents for _, latents, _ in steps])),
        "coefficients": table[:, COLUMNS.index("x0_latents") :], "guidance": named["guidance"],
        "timestep": named["timestep"], "text": torch.stack([text[1] for _, _, text in steps]),
        "negative_text": torch.stack([text[0] for _, _, text in steps]),
    }  # fmt: skip


def guided_inputs(motion: tuple[Tensor, Tensor], *steps: tuple[int, Tensor, Tensor], weight: float = 1.0) -> dict[str, Tensor]:
    """`step_inputs` and what is read of the motion."""
    named = dict(zip(COLUMNS, ROWS[[index for index, _, _ in steps]].unbind(1), strict=True))
    weights, targets = (part.expand(len(steps), *part.shape[1:]) for part in motion)
    own = {"weight": weight * named["weight"], "motion_scale": named["motion_scale"]}
    return {**step_inputs(*steps), **own, "motion_weights": weights, "motion_targets": targets}


# --- the released numbers -------------------------------------------------------------------------------------------


def test_forward_is_the_released_one(unet: TappedUNet) -> None:
    wanted = golden("forward")
    close(turned(unet(turned(wanted["sample"]), wanted["timestep"].float(), wanted["text"])), wanted["eps"])


def test_representation_is_the_released_one(unet: TappedUNet) -> None:
    wanted, (values, indices) = golden("representation"), stored_motion("representation")
    found = extract(unet, wanted["text_null"]).seen(turned(wanted["z0"]), turned(wanted["noise"]))
    close(found[0], values)
    assert torch.equal(found[1], indices.long())


def test_guided_step_is_the_released_one_also_in_a_batch(unet: TappedUNet) -> None:
    wanted, run, motion = golden("guided_step"), golden("run"), motion_of("representation")
    step = GuidedStep(unet)
    one = (1, wanted["x_t"], wanted["text"])
    found, energy = step(**guided_inputs(motion, one))
    close(turned(found), wanted["x_prev"])
    close(energy, wanted["energy"])
    # a request of another step beside it
    found, energy = step(**guided_inputs(motion, (0, run["latents"][:1], run["text"]), one))
    close(turned(found), torch.cat([run["latents"][1:2], wanted["x_prev"]]))
    close(energy, torch.cat([run["energy"][:1], wanted["energy"]]))


def test_a_guided_step_goes_down_the_released_gradient_and_no_further(unet: TappedUNet) -> None:
    wanted = golden("guided_step")
    inputs = guided_inputs(motion_of("representation"), (1, wanted["x_t"], wanted["text"]))
    plain = PlainStep(unet)(*(inputs[name] for name in step_inputs((1, wanted["x_t"], wanted["text"]))))
    moved = turned(GuidedStep(unet)(**inputs)[0] - plain)
    length = ((1 - wanted["alpha_bar"]) * (1 - wanted["alpha_bar_prev"])).sqrt()
    torch.testing.assert_close(moved, -length * wanted["grad"], atol=1e-5, rtol=1e-4)


def test_plain_step_is_the_released_one_also_in_a_batch(unet: TappedUNet) -> None:
    wanted, run = golden("plain_step"), golden("run")
    found = PlainStep(unet)(**step_inputs((5, wanted["x_t"], wanted["text"]), (8, run["latents"][8:9], run["text"])))
    close(turned(found), torch.cat([wanted["x_prev"], run["latents"][9:10]]))


@pytest.mark.slow
def test_the_whole_run_is_the_released_one(unet: TappedUNet) -> None:
    run, reference = golden("run"), golden("representation")
    assert torch.equal(run["initial_noise"], reference["noise"])
    start = turned(run["initial_noise"])
    motion = extract(unet, reference["text_null"])(turned(reference["z0"])[:, None], torch.zeros(1, 1), start)
    guided, plain = GuidedStep(unet), PlainStep(unet)
    latents = run["initial_noise"]
    for index in range(10):
        if index < 5:
            found, energy = guided(**guided_inputs(motion, (index, latents, run["text"])))
            close(energy[0], run["energy"][index])
        else:
            found = plain(**step_inputs((index, latents, run["text"])))
        latents = turned(found)
        close(latents, run["latents"][index + 1 : index + 2])


# --- SparseCtrl -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse() -> Any:
    return prepared(loaded(SparseControlNetModel(**SPARSE), "sparsectrl"))


def given() -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The condition of the golden video `[n, c, h, w]`, its texts (u, c) `[2, L, D]`, timestep `[1]` and the frames that have a
    condition."""
    io = golden("sparsectrl_io")
    return turned(io["condition_image_latents"])[0], io["text"], io["t"].float(), tuple(io["image_index"].tolist())


def table(sparse: Any) -> tuple[Tensor, ...]:
    """Its residuals as the steps read them."""
    condition, text, time, places = given()
    found: tuple[Tensor, ...] = Sparse(sparse, 16, places)(condition, text[1:], text[:1], time)
    return found


def test_residuals_of_sparsectrl_are_the_released_ones(unet: TappedUNet, sparse: Any) -> None:
    io, found = golden("sparsectrl_io"), table(sparse)
    names = [*(f"down.{i}" for i in range(12)), "mid"]
    assert len(found) == len(names) == len(Control(sparse).names)
    for residual, name in zip(found, names, strict=True):
        close(residual[0], turned(io[name]))
    latents, time = turned(io["x_t"]).expand(2, -1, -1, -1, -1), io["t"].float().expand(2)
    close(turned(unet(latents, time, io["text"], [residual.flatten(0, 2) for residual in found])), io["eps"])


def test_a_table_of_residuals_holds_those_of_every_step_and_has_the_shapes_that_a_step_reads(sparse: Any) -> None:
    condition, text, time, _ = given()
    control, times = Control(sparse), torch.cat([time, time - 300])
    found = Sparse(sparse, 16)(condition[:1], text[1:], text[:1], times)
    shapes = control.shapes((16, 4, *condition.shape[2:]))
    assert [tuple(both.shape) for both in found] == [(2, 2, *shapes[name]) for name in control.names]
    for index in range(2):
        alone = residuals(sparse, condition[None, :1], text, times[index : index + 1].expand(2), 16, (0,))
        for both, residual in zip(found, alone, strict=True):
            close(both[index].flatten(0, 1), residual)
    assert (found[1][0] - found[1][1]).abs().max() > 1e-3  # steps differ, and so do the branches of guidance
    assert (found[1][:, 0] - found[1][:, 1]).abs().max() > 1e-3


def test_extraction_with_sparsectrl_is_the_released_one(unet: TappedUNet, sparse: Any) -> None:
    """Also of two references at once, of which only the first counts."""
    reference, (values, indices), (*_, places) = golden("representation"), stored_motion("sparsectrl_io"), given()
    latents, start = turned(reference["z0"]), turned(reference["noise"])
    two = torch.stack([latents, latents.flip(1)], 1)
    added = OfReferences(sparse, 16, reference["text_null"], 400, False, places)(two)
    motion = extract(unet, reference["text_null"])
    found = motion.seen(latents, start, [residual[:, 0].flatten(0, 1) for residual in added])
    close(found[0], values)
    assert torch.equal(found[1], indices.long())
    for one, wanted in zip(motion(two, torch.tensor([[200.0, 0.0]]), start, *added), motion_of("sparsectrl_io"), strict=True):
        assert torch.equal(one > 0, wanted > 0)
        close(one, wanted)


def test_guided_step_with_sparsectrl_is_the_released_one(unet: TappedUNet, sparse: Any) -> None:
    io, added = golden("sparsectrl_io"), table(sparse)
    inputs = guided_inputs(motion_of("sparsectrl_io"), (1, io["x_t"], io["text"]))
    assert torch.equal(inputs["timestep"], io["t"].float())
    found, energy = GuidedStep(unet)(*(inputs[name] for name in GUIDED), *added)
    close(turned(found), io["guided.x_prev"])
    close(energy, io["guided.energy"])
    plain = PlainStep(unet)(*(inputs[name] for name in CHANGES), *added)
    length = inputs["coefficients"][:, -1]
    torch.testing.assert_close(turned(found - plain), -length * io["guided.grad"], atol=1e-5, rtol=1e-4)


# --- what must hold -------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of a batch of one and of two are the same numbers only where no threads share them out."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def test_weight_zero_is_plain_animatediff_bit_for_bit(unet: TappedUNet, one_thread: None) -> None:
    wanted = golden("guided_step")
    one = (1, wanted["x_t"], wanted["text"])
    found, energy = GuidedStep(unet)(**guided_inputs(motion_of("representation"), one, weight=0.0))
    assert energy.item() == 0 and torch.equal(found, PlainStep(unet)(**step_inputs(one)))


@pytest.mark.slow
def test_energy_of_guided_steps_falls_below_that_of_plain_ones(unet: TappedUNet) -> None:
    run, motion, plain = golden("run"), motion_of("representation"), PlainStep(unet)
    latents, energies = run["initial_noise"], []
    for index in range(5):
        inputs = step_inputs((index, latents, run["text"]))
        _, _, seen = unet.head(inputs["latents"], unet.embedded(inputs["timestep"]), inputs["text"])
        energies.append(distance(seen, *motion))
        latents = turned(plain(**inputs))
    guided = run["loss_unweighted"]
    close(energies[0], guided[:1])
    assert (guided[1:] < torch.cat(energies[1:])).all()


@pytest.mark.slow
def test_statistics_shared_by_frames_change_what_is_seen(unet: TappedUNet) -> None:
    wanted, (_, indices) = golden("representation"), stored_motion("representation")
    found = extract(tapped("shared"), wanted["text_null"]).seen(turned(wanted["z0"]), turned(wanted["noise"]))
    assert int((found[1] != indices).sum()) == 739  # as the README of the numbers says
    forward = golden("forward")
    shared = tapped("shared")(turned(forward["sample"]), forward["timestep"].float(), forward["text"])
    assert 0.01 < (shared - turned(forward["eps"])).abs().max() < 0.1


def test_clips_have_places_of_their_own_where_a_request_says_so(unet: TappedUNet) -> None:
    """The first clip is the camera's: it has what no other moves in. Two others share a place by their scores."""
    reference = golden("representation")
    latents, start = turned(reference["z0"]), turned(reference["noise"])
    things = torch.zeros(2, *latents.shape[1:])  # 16 x 8 latents, a grid of 4 x 2 places
    things[0, ::2, :, 4:8, :4] = 1  # moves in place 2
    things[1, ::2, :, 4:8] = 1  # in places 2 and 3
    clips, scores = torch.stack([latents[0], *things])[None], torch.tensor([[3.0, 0.0, 1.0]])
    plain, level = extract(unet, reference["text_null"]), float(ALPHAS[400])
    composed = Extract(unet, reference["text_null"], 400, level, 1.0, composed=True)
    for one, wanted in zip(composed(clips, scores, start, torch.zeros(1)), plain(clips, scores, start), strict=True):
        assert torch.equal(one, wanted)
    shares = by_place(clips, torch.softmax(scores, 1), 4)[0]
    both = torch.softmax(scores[0, 1:], 0)
    camera = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 1])
    wanted = torch.stack([camera, torch.zeros(8), torch.zeros(8)])
    wanted[1:, 2], wanted[2, 3] = both, 1
    torch.testing.assert_close(shares, wanted)
    weights, targets = composed(clips, scores, start, torch.ones(1))
    alone = [plain(clips[:, i : i + 1], scores[:, :1], start) for i in range(3)]
    for place, clip in ((0, 0), (3, 2), (7, 0)):
        assert torch.equal(weights[:, :, place], alone[clip][0][:, :, place])
        torch.testing.assert_close(targets[:, :, place], alone[clip][1][:, :, place])
    mixed = sum(share * alone[clip][0][:, :, 2] for share, clip in zip(both, (1, 2), strict=True))
    torch.testing.assert_close(weights[:, :, 2], mixed)


def test_a_memory_of_motion_holds_what_is_read_with_its_noise(unet: TappedUNet) -> None:
    wanted, (values, indices) = golden("representation"), stored_motion("representation")
    latents, start, scores = turned(wanted["z0"]), turned(wanted["noise"]), torch.tensor([[0.2, 0.4]])
    found = Represent(unet, wanted["text_null"], 400, float(ALPHAS[400]), start)(torch.cat([latents, latents.flip(1)]))
    close(found[0][:1], values)
    assert torch.equal(found[1][:1], indices) and indices.dtype == found[1].dtype == torch.uint8
    both = extract(unet, wanted["text_null"])(torch.stack([latents, latents.flip(1)], 1), scores, start)
    for one, other in zip(Fuse(1.0)(*(part[None] for part in found), scores), both, strict=True):
        close(one, other)


def test_a_memory_of_motion_is_for_the_statistics_and_the_text_that_it_was_made_with(unet: TappedUNet) -> None:
    """The network's digest is a part of the memory's fingerprint, and neither is among the weights."""
    text = golden("representation")["text_null"]

    def digest(net: TappedUNet, null_text: Tensor) -> str:
        given = {"unet": net, "null_text": null_text, "latents": (16, 4, 16, 8), "alphas": ALPHAS, "fixed_noise": True}
        unused = {part.name: None for part in fields(Parts) if part.default is part.default_factory is MISSING}
        made: str = motion_record(Parts(**{**unused, **given}), {}).graphs["represent"].network.digest()
        return made

    assert digest(unet, text) == digest(tapped(), text)
    assert len({digest(unet, text), digest(tapped("shared"), text), digest(unet, text + 1)}) == 3


def test_a_clip_alone_has_every_place_however_it_is_composed() -> None:
    clip = torch.randn(2, 1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(by_place(clip, torch.ones(2, 1), 2), torch.ones(2, 1, 16))


def test_a_clip_that_is_generated_as_the_reference_was_noised_has_no_energy(unet: TappedUNet) -> None:
    wanted = golden("representation")
    values, indices = stored_motion("representation")
    _, _, seen = unet.head(turned(wanted["z_t"]), unet.embedded(torch.tensor([400.0])), wanted["text_null"])
    motion = fused(values[:, None], indices[:, None].long(), torch.ones(1, 1, 1), 16)
    assert distance(seen, *motion).item() < 1e-9
    _, _, seen = unet.head(turned(wanted["z_t"]).flip(1), unet.embedded(torch.tensor([400.0])), wanted["text_null"])
    assert distance(seen, *motion).item() > 0.1


def test_gradient_in_queries_and_keys_is_the_closed_form() -> None:
    draw = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, 6, 2, 5, 8, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    values = torch.rand(1, 1, 1, 6, 2, 5, generator=draw, dtype=torch.float64)
    indices = torch.randint(5, (1, 1, 1, 6, 2, 5), generator=draw)
    scale, weight = 8**-0.5, 7.0
    seen = torch.softmax(query @ key.transpose(-1, -2) * scale, -1)
    energy = weight * distance([seen], *fused(values, indices, torch.ones(1, 1, 1, dtype=torch.float64), 5)).sum()
    found = torch.autograd.grad(energy, (query, key))
    with torch.no_grad():
        probability, (level, best) = seen[0], (values[0, 0, 0], indices[0, 0, 0])
        chosen = torch.nn.functional.one_hot(best, 5).double()
        own = (probability * chosen).sum(-1)
        rho = 2 * weight / own.numel() * (own - level) * own
        slope = scale * rho[..., None] * (chosen - probability)  # [P, N, query, key]
        torch.testing.assert_close(found[0][0], slope @ key[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(found[1][0], slope.transpose(-1, -2) @ query[0], atol=1e-12, rtol=0)
