"""benchmarks/models/sparse_models.py: files of the released layouts that hold nothing, and are opened as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks.models import export_full, sparse_models  # noqa: E402
from motionrt.export.checkpoints.files import open_torch_file  # noqa: E402
from motionrt.export.checkpoints.motion_i2v_files import MotionI2VSources, open_motion_i2v  # noqa: E402

UNET: dict[str, Any] = {
    "attention_head_dim": 2, "block_out_channels": [8, 16], "cross_attention_dim": 12, "in_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8,
}  # fmt: skip
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [4, 8],
    "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 16,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 7, "hidden_act": "quick_gelu",
}  # fmt: skip


def test_a_torch_file_of_holes_opens_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "inside" / "x.bin"
    sparse_models.torch_file(path, {"a": (1000, 1000), "b.c": (3,)}, torch.float32)
    opened = open_torch_file(path)
    assert {key: lazy.shape for key, lazy in opened.items()} == {"a": (1000, 1000), "b.c": (3,)}
    assert not opened["a"].read().any()
    assert path.stat().st_size > 4_000_000 > 10 * path.stat().st_blocks * 512


def test_the_files_for_motion_i2v_are_those_that_its_export_takes(tmp_path: Path) -> None:
    sparse_models.write_motion_i2v(tmp_path, UNET, VAE, TEXT)
    opened = open_motion_i2v(MotionI2VSources(tmp_path / "models"))
    assert opened.stage1_config["in_channels"] == 8 and opened.stage2_config["motion_max_seq_length"] == 32
    for name in ("stage 1", "ControlNet", "motion modules"):
        report = next(report for report in opened.reports if report.what == name)
        assert set(report.ignored.values()) == {"positions, made anew"}, name
    request = export_full.Request("motion-i2v", 3, size=(16, 32))
    system = export_full.open_system(tmp_path, request, lambda text: None)
    assert [step.suffix for step in system.steps] == ["_drawn", "_plain", "_video"]


def test_a_table_of_positions_is_in_both_attentions_of_its_block() -> None:
    block = "down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0"
    assert sparse_models.named("down_blocks.0.motion_modules.1.transformer_blocks.0.pos_embed.pe") == tuple(
        f"{block}.attention_blocks.{i}.pos_encoder.pe" for i in range(2)
    )
    assert sparse_models.named("conv_in.weight") == ("conv_in.weight",)


def classes(out_of_the_loop: int, model: int) -> dict[str, dict[str, int]]:
    return {"schedule": {"parameters": out_of_the_loop}, "constant": {"parameters": 0}, "model": {"parameters": model}}


def test_every_step_of_a_row_is_held_against_what_is_expected() -> None:
    """Of Motion-I2V: the ControlNet beside stage 1, stage 1 alone, and stage 2."""
    expected = export_full.EXPECTED["motion-i2v"]
    assert expected.others is not None
    row = {
        "classes": classes(expected.out_of_the_loop, expected.model),
        "other_classes": [classes(*pair) for pair in expected.others],
        "graphs": {"step_video": {"motion_attentions": 0}},
    }
    export_full.check_counts(row, expected)
    for wrong in ([classes(*expected.others[0])], [*row["other_classes"][:1], classes(1, 2)]):
        with pytest.raises(ValueError, match="is expected"):
            export_full.check_counts({**row, "other_classes": wrong}, expected)
    export_full.check_counts(row, export_full.Expected(expected.out_of_the_loop, expected.model, 0))  # not looked at
