"""Motion-I2V's files: every key is accounted for, and those of autoencoders in the layouts that they are published in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from by_path import load_by_path  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.checkpoints.motion_i2v_files import MotionI2VSources, open_motion_i2v  # noqa: E402
from motionrt.export.checkpoints.renaming import compvis_name  # noqa: E402
from motionrt.export.compiler.weightless import meta  # noqa: E402
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/motion_i2v_models.py")
FULL: dict[str, Any] = {"cross_attention_dim": 768, "num_attention_heads": 8, "motion_num_attention_heads": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return models.released_files(tmp_path_factory.mktemp("released"))


def test_every_weight_is_read_under_its_own_name(files: Any) -> None:
    opened = open_motion_i2v(MotionI2VSources(files.models))
    pairs = [(getattr(opened, name), getattr(files, name), "") for name in ("stage1", "drawn", "stage2")]
    pairs += [(getattr(opened, name).weights, getattr(files, name), "vae.") for name in ("flow_vae", "vae")]
    for weights, module, prefix in pairs:
        state = {f"{prefix}{name}": v for name, v in module.state_dict().items() if not name.endswith("pos_embed.pe")}
        assert weights.keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(weights[name].read(), value), name
    for kind, config, module in (
        (FlowUNet, opened.stage1_config, files.stage1),
        (Trajectories, opened.drawn_config, files.drawn),
        (VideoUNet, opened.stage2_config, files.stage2),
    ):
        assert {n: v.shape for n, v in kind(config).state_dict().items()} == {
            n: v.shape for n, v in module.state_dict().items()
        }
    assert len(opened.reports) == 7
    for report in opened.reports[:3]:  # the networks but for the still part of stage 2
        assert set(report.ignored.values()) == {"positions, made anew"}


@pytest.mark.parametrize(
    ("file", "key", "match"),
    [
        ("stage1/StableDiffusion-FlowGen/unet/diffusion_pytorch_model.bin", "stride_embedding.linear_1.bias", "stage 1"),
        ("stage1/StableDiffusion-FlowGen/controlnet/controlnet.bin", "controlnet.controlnet_mid_block.bias", "ControlNet"),
        ("stage2/Motion_Module/motion_block.bin", None, "motion modules"),
        ("stage2/DreamBooth_LoRA/realistic_unet.ckpt", "conv_in.bias", "stage 2"),
    ],
)
def test_a_key_too_few_or_too_many_is_refused(file: str, key: str | None, match: str, tmp_path: Path) -> None:
    made = models.released_files(tmp_path)
    path = made.models / file
    state = torch.load(path, weights_only=True)
    key = key or next(name for name in state if "norms" in name)
    torch.save({**state, "time_embedding.linear_3.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=f"{match} .*unexpected key `time_embedding.linear_3.weight`"):
        open_motion_i2v(MotionI2VSources(made.models))
    state.pop(key)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"{match} .*lacks key `{key.removeprefix('controlnet.')}`"):
        open_motion_i2v(MotionI2VSources(made.models))


def test_a_form_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match="form is 'mixed'; allowed: own, released"):
        MotionI2VSources(Path("models"), form="mixed")


def test_compvis_names_of_stable_diffusion_s_autoencoder_are_those_that_diffusers_converts() -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config: dict[str, Any] = {
        "block_out_channels": (4, 8, 8, 8), "layers_per_block": 2, "norm_num_groups": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    state = AutoencoderKL(**config).state_dict()
    theirs = {f"first_stage_model.{compvis_name(name, 4)}": value for name, value in state.items()}
    assert len(theirs) == len(state)
    found = convert_ldm_vae_checkpoint(theirs, config)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_networks_have_as_many_weights_as_the_released_ones() -> None:
    """At full size, in millions: of the spec's section 4.1; the ControlNet's by its file, about 2.3 GB in float32."""
    with meta():
        nets = FlowUNet({**FULL, "in_channels": 8}), VideoUNet(FULL), Trajectories({**FULL, "in_channels": 8})
    counts = [sum(value.numel() for value in net.parameters()) / 1e6 for net in nets]
    assert [round(count, 1) for count in counts] == [1314.8, 1312.7, 566.7]
