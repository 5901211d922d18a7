"""DynamiCrafter's one released file: every key is accounted for, in whatever container, and sizes are read off tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from by_path import load_by_path  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from motionrt.export.checkpoints.dynamicrafter_files import open_dynamicrafter  # noqa: E402
from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.checkpoints.motionrag_files import DYNAMICRAFTER, SosToken, open_motionrag  # noqa: E402
from motionrt.export.systems.dynamicrafter.system import DynamiCrafterSources, check_model, geometry  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/dynamicrafter_models.py")
release = models.models.release


@pytest.fixture(scope="module")
def parts() -> Any:
    return models.small()


def file_of(folder: Path, state: dict[str, Any], around: Callable[[dict[str, Any]], Any] = lambda state: state) -> Path:
    torch.save(around(state), folder / "model.ckpt")
    return folder / "model.ckpt"


def deepspeed(state: dict[str, Any]) -> dict[str, Any]:
    return {"module": {f"_forward_module.{key}": value for key, value in state.items()}, "global_steps": 7}


@pytest.mark.parametrize(
    "around",
    [lambda state: state, lambda state: {"state_dict": state, "epoch": 1}, deepspeed],
    ids=["bare", "Lightning", "DeepSpeed"],
)
def test_every_key_of_a_file_is_used_or_ignored_for_a_reason(around: Any, tmp_path: Path, parts: Any) -> None:
    file_of(tmp_path, parts.state, around)
    files = open_dynamicrafter(tmp_path)
    assert files.size == models.SIZE and files.scale == pytest.approx(0.3)
    used = sum(len(report.used) for report in files.reports)
    ignored = [why for report in files.reports for why in report.ignored.values()]
    fused = 4 * sum(key.endswith(("in_proj_weight", "in_proj_bias")) and ".resblocks.3." not in key for key in parts.state) // 2
    assert used + len(ignored) == len(parts.state) + fused  # three weights of ours are one in the towers
    assert set(ignored) == {
        "made anew", "the last block is not run", "tokens are read, not the embedding", "for training",
        "of a second text tower, which is not run",
    }  # fmt: skip


def test_weights_are_those_of_the_modules(tmp_path: Path, parts: Any) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: value.contiguous().clone() for key, value in parts.state.items()}, file)
    files = open_dynamicrafter(file)
    for weights, inside, module in (
        (files.unet, "unet.", parts.unet), (files.text.weights, "model.", parts.text), (files.vae.weights, "vae.", parts.vae),
        (files.clip.weights, "clip.", parts.clip), (files.projector.weights, "projector.", parts.projector),
    ):  # fmt: skip
        state = module.state_dict()
        assert weights.keys() == {inside + name for name in state}
        for name, value in state.items():
            assert weights[inside + name].shape == tuple(value.shape)
            torch.testing.assert_close(weights[inside + name].read(), value, atol=0, rtol=0)


def test_the_256_model_has_other_names_and_says_what_it_is(tmp_path: Path) -> None:
    small = models.write(tmp_path, "256")
    assert any(".framestride_embed." in key for key in small.state) and "scale_arr" not in small.state
    files = open_dynamicrafter(tmp_path)
    assert files.size.learned and files.scale is None
    check_model(files, "256")
    for other in ("1024", "512"):
        with pytest.raises(CheckpointError, match=rf"not the file of dynamicrafter-{other}.*Export it as dynamicrafter-256"):
            check_model(files, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("model.diffusion_model.out.2.bias"), r"UNet .* lacks key `out.2.bias`; 478 keys are expected"),
        (lambda s: s.update({"model.diffusion_model.more": torch.ones(1)}), r"UNet .* has the unexpected key `more`"),
        (lambda s: s.update({"lora.more": torch.ones(1)}), r"noise schedule .* has the unexpected key `lora.more`"),
        (lambda s: s.update({"embedder.model.visual.more": torch.ones(1)}), r"image tower .* unexpected key `visual.more`"),
        (lambda s: s.pop("cond_stage_model.model.positional_embedding"), r"lacks `positional_embedding`"),
        (lambda s: s.pop("model.diffusion_model.init_attn.0.proj_in.weight"), r"lacks `init_attn.0.proj_in.weight`"),
        (lambda s: [s.pop(k) for k in [*s] if k.startswith("embedder.")], r"has no key `embedder.model.…`.*towers are in it"),
    ],
    ids=["too few", "too many", "of nothing", "of a tower", "no size", "no head width", "pruned"],
)
def test_a_file_that_does_not_fit_is_refused(change: Any, said: str, tmp_path: Path, parts: Any) -> None:
    state = dict(parts.state)
    change(state)
    with pytest.raises(CheckpointError, match=said):
        open_dynamicrafter(file_of(tmp_path, state))


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model.ckpt or model.safetensors"):
        open_dynamicrafter(tmp_path)


def test_sizes_that_the_network_cannot_do_are_refused(tmp_path: Path, parts: Any) -> None:
    files = open_dynamicrafter(file_of(tmp_path, parts.state))
    sources = DynamiCrafterSources(tmp_path, tmp_path)
    assert geometry(files, sources, 4, (16, 32)) == (4, 4, 8, 16)
    with pytest.raises(CheckpointError, match="the size is 18x32; allowed: multiples of 4 pixels"):
        geometry(files, sources, 4, (18, 32))
    with pytest.raises(CheckpointError, match="frames is 5; allowed: 2 or more that share the 48 image tokens evenly"):
        geometry(files, sources, 5, (16, 32))
    assert geometry(files, DynamiCrafterSources(tmp_path, tmp_path, frame_tokens="all"), 5, (16, 32))[0] == 5


def test_choices_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for given, said in (
        ({"model": "768"}, "model is '768'; allowed: 1024, 512, 256"),
        ({"passes": 4}, "passes is 4; allowed: 2, or 3"),
        ({"frame_tokens": "own"}, "frame_tokens is 'own'; allowed: split, all"),
        ({"sos": SosToken(seed=1)}, "are MotionRAG's: give its folder too"),
        ({"motionrag": tmp_path}, "without videomae or dinov2"),
    ):
        with pytest.raises(CheckpointError, match=said):
            DynamiCrafterSources(tmp_path, tmp_path, **given)  # type: ignore[arg-type]


def test_queries_that_the_training_did_not_save_are_drawn_from_a_seed_that_is_asked_for(tmp_path: Path) -> None:
    files = release.motionrag_states(models.blocks(), overlay=False, names=DYNAMICRAFTER)
    state = files["Motion-Adapter.ckpt"]["state_dict"]
    for key in [key for key in state if key.endswith(".to_q_a.weight")]:
        del state[key]
    release.save(tmp_path, files)

    def opened(seed: int | None) -> Any:
        return open_motionrag(tmp_path, models.blocks(), overlay=False, sos=SosToken(seed=1), names=DYNAMICRAFTER, queries=seed)

    with pytest.raises(CheckpointError, match=r"has no `.*attn2.to_q_a.weight`, nor any other.*--adapter-queries seed:42"):
        opened(None)
    drawn = {key: lazy.read() for key, lazy in opened(3).adapter.items() if ".to_q_a." in key}
    assert len(drawn) == len(models.blocks()) == 4
    for key, value in drawn.items():
        width = models.blocks()[key.removesuffix(".to_q_a.weight")]
        assert value.shape == (width, width) and 0.9 < float(value.abs().max()) * width**0.5 <= 1
        torch.testing.assert_close(value, opened(3).adapter[key].read(), atol=0, rtol=0)
        assert (value - opened(4).adapter[key].read()).abs().max() > 0.01
