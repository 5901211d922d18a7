"""AnimateDiff's published files: every layout gives the same weights, and what does not belong is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from by_path import load_by_path  # noqa: E402
from diffusers import AutoencoderKL, MotionAdapter, SparseControlNetModel, UNetMotionModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

from motionrt.benchmarks.models.sparse_models import write_motionclone  # noqa: E402
from motionrt.export.checkpoints.animatediff_files import (  # noqa: E402
    AnimateDiff,
    MotionCloneSources,
    open_animatediff,
    released_name,
)
from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.checkpoints.tokenizers import clip_tokenizer_json  # noqa: E402

models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/animatediff_models.py")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return models.animatediff(tmp_path_factory.mktemp("animatediff"))


@pytest.fixture(scope="module")
def opened(files: Any) -> AnimateDiff:
    return open_animatediff(MotionCloneSources(files.base, files.motion, sparsectrl=files.sparsectrl))


def values(weights: Any) -> dict[str, Any]:
    return {name: lazy.read() for name, lazy in weights.items()}


def same(found: Any, wanted: dict[str, Any]) -> None:
    read = values(found)
    assert read.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(read[name], value)] == []


def changed_base(files: Any, folder: Path, part: str, **changes: Any) -> Path:
    """A copy of the base with other settings in the config of `part`."""
    base = shutil.copytree(files.base, folder / "base")
    path = base / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return base


# --- layouts --------------------------------------------------------------------------------------------------------


def test_released_files_are_opened_and_every_key_is_accounted_for(opened: AnimateDiff) -> None:
    wanted = models.golden("unet")
    assert {released_name(name) for name in opened.unet} == wanted.keys()
    for name, value in values(opened.unet).items():
        assert torch.equal(value, wanted[released_name(name)])
    # 40 tables of positions, and the settings, are in the file of the motion modules and are not read
    counts = {report.what: (len(report.used), len(report.ignored)) for report in opened.reports}
    assert counts == {
        "unet": (688, 0), "motion modules": (520, 41), "SparseCtrl": (480, 0), "vae": (180, 0), "text_encoder": (36, 1),
    }  # fmt: skip
    assert opened.scheduler == models.SCHEDULER and opened.tokenizer.max_length == models.TOKENS


def test_weights_fit_the_classes_of_diffusers(opened: AnimateDiff) -> None:
    unet = UNetMotionModel(**opened.unet_config)
    left = unet.load_state_dict(values(opened.unet), strict=False)
    assert not left.unexpected_keys and all(key.endswith("pos_embed.pe") for key in left.missing_keys)
    heads = {
        unet.up_blocks[1].motion_modules[0].transformer_blocks[0].attn1.heads,
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads,
    }
    assert heads == {4} and len(left.missing_keys) == 20
    assert opened.sparsectrl is not None and opened.sparsectrl.mode == "rgb"
    sparse = SparseControlNetModel(**opened.sparsectrl.config)
    left = sparse.load_state_dict(values(opened.sparsectrl.weights), strict=False)
    assert not left.unexpected_keys and len(left.missing_keys) == 8
    assert sparse.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads == 4


@pytest.mark.slow
def test_folders_of_diffusers_give_the_same(files: Any, opened: AnimateDiff, tmp_path: Path) -> None:
    adapter = MotionAdapter(
        block_out_channels=(8, 16, 24, 32), motion_num_attention_heads=4, motion_norm_num_groups=4, use_motion_mid_block=False
    )
    adapter.load_state_dict({k: v for k, v in values(opened.unet).items() if "motion_modules" in k}, strict=False)
    adapter.save_pretrained(tmp_path / "motion")
    assert opened.sparsectrl is not None
    sparse = SparseControlNetModel(**opened.sparsectrl.config)
    sparse.load_state_dict(values(opened.sparsectrl.weights), strict=False)
    sparse.save_pretrained(tmp_path / "sparse")
    found = open_animatediff(MotionCloneSources(files.base, tmp_path / "motion", sparsectrl=tmp_path / "sparse"))
    same(found.unet, values(opened.unet))
    assert found.sparsectrl is not None and found.sparsectrl.mode == "rgb"
    same(found.sparsectrl.weights, values(opened.sparsectrl.weights))
    plain, from_folder = (dict(UNetMotionModel(**config).config) for config in (opened.unet_config, found.unet_config))
    assert plain | {"_use_default_values": []} == from_folder | {"_use_default_values": []}


def test_motion_modules_may_lie_in_a_file_of_the_whole_unet(files: Any, opened: AnimateDiff, tmp_path: Path) -> None:
    whole = tmp_path / "unet.safetensors"
    save_file({f"module.{key}": value for key, value in models.golden("unet").items()}, whole)
    found = open_animatediff(MotionCloneSources(files.base, whole))
    same(found.unet, values(opened.unet))
    report = next(report for report in found.reports if report.what == "motion modules")
    assert len(report.ignored) == 688 and report.ignored["conv_in.weight"] == "no motion module: the base's own is used"


def test_positions_of_a_shorter_module_bound_the_frames(files: Any, tmp_path: Path) -> None:
    moving = models.released_motion(models.split(models.golden("unet"))[1])
    moving["state_dict"] = {k: v[:, :24] if k.endswith(".pe") else v for k, v in moving["state_dict"].items()}
    torch.save(moving, tmp_path / "mm.ckpt")
    assert open_animatediff(MotionCloneSources(files.base, tmp_path / "mm.ckpt")).unet_config["motion_max_seq_length"] == 24


def test_a_sketch_embedding_is_recognised_by_its_convolutions(files: Any, tmp_path: Path) -> None:
    state = {k: v for k, v in models.golden("sparsectrl").items() if not k.startswith("controlnet_cond_embedding")}
    stack = SparseControlNetModel(
        block_out_channels=(8,), down_block_types=("DownBlockMotion",), norm_num_groups=4, conditioning_channels=3,
        conditioning_embedding_out_channels=(4, 6, 8, 10), use_simplified_condition_embedding=False,
        motion_num_attention_heads=4, attention_head_dim=4, cross_attention_dim=20,
    ).controlnet_cond_embedding.state_dict()  # fmt: skip
    save_file(state | {f"controlnet_cond_embedding.{k}": v for k, v in stack.items()}, tmp_path / "scribble.safetensors")
    found = open_animatediff(MotionCloneSources(files.base, files.motion, sparsectrl=tmp_path / "scribble.safetensors"))
    assert found.sparsectrl is not None and found.sparsectrl.mode == "sketch"
    assert found.sparsectrl.config["conditioning_embedding_out_channels"] == (4, 6, 8, 10)
    left = SparseControlNetModel(**found.sparsectrl.config).load_state_dict(values(found.sparsectrl.weights), strict=False)
    assert not left.unexpected_keys and len(left.missing_keys) == 8


def test_autoencoder_text_encoder_and_tokenizer_are_those_of_their_libraries(files: Any, opened: AnimateDiff) -> None:
    vae = AutoencoderKL.from_pretrained(files.base / "vae", local_files_only=True)
    same(opened.vae.weights, {f"vae.{name}": value for name, value in vae.state_dict().items()})
    tokenizer = CLIPTokenizer.from_pretrained(files.base / "tokenizer", local_files_only=True)
    ours = Tokenizer.from_str(opened.tokenizer.json)
    text = "A  blue drift"
    padded = tokenizer(text, padding="max_length", max_length=models.TOKENS).input_ids
    ids = ours.encode(text).ids
    assert ids + [opened.tokenizer.pad_id] * (models.TOKENS - len(ids)) == padded
    model = CLIPTextModel.from_pretrained(files.base / "text_encoder", local_files_only=True).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([padded])).last_hidden_state
        torch.testing.assert_close(opened.text.loaded()(torch.tensor([padded])), wanted, rtol=0, atol=0)


@pytest.mark.slow
def test_files_of_the_published_sizes_have_the_published_numbers_of_weights(tmp_path: Path) -> None:
    write_motionclone(tmp_path)

    def millions(weights: Any, only: str = "") -> float:
        return round(sum(math.prod(lazy.shape) for name, lazy in weights.items() if only in name) / 1e6, 1)

    for mode, embedding in (("rgb", 0.0), ("sketch", 1.1)):  # a stack of convolutions reads a sketch
        given = MotionCloneSources(
            tmp_path / "base", tmp_path / "motion.safetensors", sparsectrl=tmp_path / f"{mode}.safetensors"
        )
        found = open_animatediff(given)
        assert [millions(found.unet), millions(found.unet, ".motion_modules.")] == [1276.7, 417.1]
        assert found.sparsectrl is not None and found.sparsectrl.mode == mode
        assert found.sparsectrl.config["motion_max_seq_length"] == 32
        sizes = [millions(found.sparsectrl.weights), millions(found.sparsectrl.weights, ".motion_modules.")]
        assert sizes == [pytest.approx(496.7 + embedding), 136.5]
    assert found.sparsectrl.config["conditioning_embedding_out_channels"] == (16, 32, 96, 256)


# --- the domain adapter ---------------------------------------------------------------------------------------------


def peft(adapter: dict[str, Any]) -> dict[str, Any]:
    """The same by PEFT's keys."""
    made = {}
    for key, value in adapter.items():
        name = key.replace(".processor.", ".").replace("_lora.down", ".lora_A").replace("_lora.up", ".lora_B")
        made[f"unet.{name.replace('.to_out.', '.to_out.0.')}"] = value
    return made


@pytest.mark.parametrize("layout", ["released", "peft"])
def test_domain_adapter_is_added_to_the_base_as_it_is_read(
    layout: str, files: Any, opened: AnimateDiff, tmp_path: Path
) -> None:
    adapter = models.released_adapter(models.split(models.golden("unet"))[0])
    file = files.adapter
    if layout == "peft":
        file = tmp_path / "adapter.safetensors"
        save_file(peft(adapter), file)
    found = open_animatediff(MotionCloneSources(files.base, files.motion, file))
    before, after = values(opened.unet), values(found.unet)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == len(adapter) // 2 == 128 and not any("motion_modules" in name for name in moved)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out"
    down, up = (adapter[f"{name.replace('.to_out', '.processor.to_out_lora')}.{side}.weight"] for side in ("down", "up"))
    torch.testing.assert_close(after[f"{name}.0.weight"], before[f"{name}.0.weight"] + up @ down)


def test_domain_adapter_keeps_the_dtype_of_the_base(files: Any, opened: AnimateDiff, tmp_path: Path) -> None:
    base = shutil.copytree(files.base, tmp_path / "base")
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    found = open_animatediff(MotionCloneSources(base, files.motion, files.adapter))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = models.released_adapter(models.split(models.golden("unet"))[0])
    down, up = (adapter[f"{name.replace('.to_q', '.processor.to_q_lora')}.{side}.weight"] for side in ("down", "up"))
    weight = found.unet[f"{name}.weight"]
    assert weight.dtype == torch.float16 and weight.shape == (32, 32)
    assert torch.equal(weight.read(), (opened.unet[f"{name}.weight"].read().half().float() + up @ down).half())


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda s: s.pop(next(k for k in s if ".up." in k)), r"domain adapter .* lacks key `.*up.weight`"),
        (lambda s: s.update({"down_blocks.9.attn1.to_q.lora_A.weight": torch.ones(2, 8)}), "unexpected key `down_blocks.9"),
        (lambda s: s.update({next(iter(s)): torch.ones(3, 8)}), "has the shape .* is expected"),
        (lambda s: (s.clear(), s.update(w=torch.ones(2))), "has no LoRA of an attention of this base"),
    ],
    ids=["half a pair", "of another base", "rank", "another file"],
)
def test_a_domain_adapter_that_does_not_fit_is_refused(damage: Any, why: str, files: Any, tmp_path: Path) -> None:
    state = models.released_adapter(models.split(models.golden("unet"))[0])
    damage(state)
    save_file(state, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=why):
        open_animatediff(MotionCloneSources(files.base, files.motion, tmp_path / "adapter.safetensors"))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (
            lambda s: s.pop(next(k for k in s if "ff_norm" in k)),
            r"modules \(.*\) lacks key `.*temporal_transformer.*ff_norm",
        ),
        (lambda s: s.update({"mid_block.motion_modules.0.extra": torch.ones(2)}), "lacks keys `mid_block.motion_modules.0"),
        (lambda s: s.update({next(k for k in s if "to_q" in k): torch.ones(3, 8)}), r"has the shape \[3, 8\]; \[8, 8\] is"),
        (lambda s: s.update({"note": "text"}), "`note` is a str; every entry must be a tensor"),
        (lambda s: s.clear(), "a dict of tensors is expected"),
    ],
    ids=["missing", "a middle", "shape", "text", "empty"],
)
def test_motion_modules_that_do_not_fit_are_refused(damage: Any, why: str, files: Any, tmp_path: Path) -> None:
    moving = models.released_motion(models.split(models.golden("unet"))[1])
    damage(moving["state_dict"])
    torch.save(moving, tmp_path / "mm.ckpt")
    with pytest.raises(CheckpointError, match=why):
        open_animatediff(MotionCloneSources(files.base, tmp_path / "mm.ckpt"))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"_class_name": "UNetMotionModel"}, "holds a UNetMotionModel; MotionAdapter is expected"),
        ({"motion_norm_num_groups": 32}, "motion_norm_num_groups is 32, and the base's norm_num_groups is 4"),
        ({"conv_in_channels": 9}, "is PIA's adapter"),
    ],
    ids=["class", "groups", "pia"],
)
def test_a_folder_of_other_motion_modules_is_refused(config: Any, why: str, files: Any, tmp_path: Path) -> None:
    written = {"_class_name": "MotionAdapter", "motion_norm_num_groups": 4, **config}
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=why):
        open_animatediff(MotionCloneSources(files.base, tmp_path))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"upcast_attention": True}, "upcast_attention is True; AnimateDiff's UNet allows False alone"),
        ({"cross_attention_dim": 24}, r"has the shape \[8, 20\]; \[8, 24\] is expected"),
        ({"_class_name": "UNet3DConditionModel"}, "holds a UNet3DConditionModel; UNet2DConditionModel is expected"),
        (
            {"down_block_types": ["SimpleCrossAttnDownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"]},
            "cannot build a UNet",
        ),
    ],
    ids=["setting", "width", "class", "block"],
)
def test_another_base_is_refused(changes: Any, why: str, files: Any, tmp_path: Path) -> None:
    base = changed_base(files, tmp_path, "unet", **changes)
    with pytest.raises(CheckpointError, match=why):
        open_animatediff(MotionCloneSources(base, files.motion))


def test_what_is_not_there_or_is_another_file_is_refused(files: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file .*nowhere.ckpt"):
        open_animatediff(MotionCloneSources(files.base, tmp_path / "nowhere.ckpt"))
    with pytest.raises(CheckpointError, match="lacks keys `down_blocks.0.motion_modules.0"):
        open_animatediff(MotionCloneSources(files.base, files.adapter))
    with pytest.raises(CheckpointError, match="has neither `controlnet_cond_embedding.weight` nor .*Give AnimateDiff's"):
        open_animatediff(MotionCloneSources(files.base, files.motion, sparsectrl=files.motion))
    with pytest.raises(CheckpointError, match="is no folder. Give the diffusers folder of the base model"):
        open_animatediff(MotionCloneSources(tmp_path / "nowhere", files.motion))
    given = MotionCloneSources(files.base, files.motion)
    for name, value in (("dtype", "int8"), ("group_norm", "per-frame")):
        with pytest.raises(CheckpointError, match=f"{name} is '{value}'; allowed: "):
            replace(given, **{name: value})


def test_a_tokenizer_that_does_not_fit_is_refused(files: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(files.base / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text('{"pad_token": {"content": "<pad>"}}')
    with pytest.raises(CheckpointError, match="the padding '<pad>' is not in the vocabulary"):
        clip_tokenizer_json(folder)
    (folder / "tokenizer_config.json").unlink()
    made, pad = clip_tokenizer_json(folder)
    (folder / "tokenizer.json").write_text(made)
    (folder / "vocab.json").unlink()
    assert clip_tokenizer_json(folder) == (made, pad)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no vocab.json"):
        clip_tokenizer_json(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no CLIP tokenizer"):
        clip_tokenizer_json(folder)
