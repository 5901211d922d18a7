"""Exports a published model at its real size, from files of the real shapes that hold zeros: memory and time, no weights.

    python benchmarks/export_full.py cogvideox-5b-i2v WORK_FOLDER --frames 17
    python benchmarks/export_full.py svd WORK_FOLDER

The files are sparse: they take little room, and reading and writing them costs what real ones would. Every graph passes the
ONNX checker and shape inference. Appends a row to results/export_full.jsonl with peak RSS (the page cache is not in it).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from harness import append_row
from motionrt.export.motionrag_files import CamaSize, ResamplerSize, SosToken, adapter_shapes, overlay_shapes
from motionrt.export.real import Sources
from motionrt.export.released import COGVIDEOX_5B_I2V
from motionrt.export.safetensors_file import sparse_file
from motionrt.export.structure import meta

BF16 = torch.bfloat16
CAUSAL_VAE: dict[str, Any] = {
    "down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "block_out_channels": [128, 256, 256, 512], "latent_channels": 16, "layers_per_block": 3, "norm_num_groups": 32,
    "sample_height": 480, "sample_width": 720, "scaling_factor": 0.7, "temporal_compression_ratio": 4,
}  # fmt: skip
T5_XXL: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "architectures": ["T5EncoderModel"], "model_type": "t5",
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "snr_shift_scale": 1.0,
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
}  # fmt: skip


def component(folder: Path, make: Any, config: Mapping[str, Any], name: str, file: str) -> None:
    """A folder with a config and a sparse file of the shapes of `make()`."""
    with meta():
        module = make()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": name, **config}))
    sparse_file(folder / file, {key: tuple(value.shape) for key, value in module.state_dict().items()}, BF16)


def write_encoders(root: Path) -> None:
    """VideoMAE-base and DINOv2-large."""
    from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEModel

    video = VideoMAEConfig(use_mean_pooling=True)
    config = {"model_type": "videomae", "use_mean_pooling": True}
    component(root / "videomae", lambda: VideoMAEModel(video), config, "VideoMAEModel", "model.safetensors")
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518, "patch_size": 14}
    image = Dinov2Config(**sizes)
    config = {"model_type": "dinov2", "architectures": ["Dinov2Model"], **sizes}
    component(root / "dinov2", lambda: Dinov2Model(image), config, "Dinov2Model", "model.safetensors")


def write_motionrag(folder: Path, blocks: Mapping[str, int], overlay: bool) -> None:
    """MotionRAG's files at the released size, as safetensors."""
    parts: dict[str, tuple[str, ResamplerSize | CamaSize]] = {
        "motion_proj": ("", ResamplerSize(1024, 4, 12, 25, 768, 1024, 4)),
        "condition_proj": ("condition_proj.", ResamplerSize(1024, 4, 12, 25, 1024, 1024, 4)),
        "cama": ("", CamaSize(25, 1024, 4, 16, 4096)),
    }
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (prefix, size) in parts.items():
        with torch.device("meta"):
            state = size.build().state_dict()
        shapes[name] = {f"{prefix}{key}": tuple(value.shape) for key, value in state.items() if key != "sos_token"}
    sparse_file(folder / "motion_proj.safetensors", shapes["motion_proj"], BF16)
    sparse_file(folder / "motion_transformer.safetensors", shapes["cama"] | shapes["condition_proj"], BF16)
    again = {f"action_proj_model.{key}": shape for key, shape in shapes["motion_proj"].items()}
    sparse_file(folder / "Motion-Adapter.safetensors", adapter_shapes(blocks, 1024) | again, BF16)
    if overlay:
        sparse_file(folder / "17_frames.safetensors", overlay_shapes(blocks), BF16)


def write_cogvideox(root: Path, layers: int) -> None:
    """The CogVideoX-5B-I2V folder, MotionRAG's files for it, and a word tokenizer in the place of T5's."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from tokenizers import Tokenizer, models, processors
    from transformers import T5Config, T5EncoderModel

    base, config = root / "base", {**COGVIDEOX_5B_I2V, "num_layers": layers}
    weights = "diffusion_pytorch_model.safetensors"
    component(
        base / "transformer", lambda: CogVideoXTransformer3DModel(**config), config, "CogVideoXTransformer3DModel", weights
    )
    component(base / "vae", lambda: AutoencoderKLCogVideoX(**CAUSAL_VAE), CAUSAL_VAE, "AutoencoderKLCogVideoX", weights)
    text = T5Config(**T5_XXL)
    component(base / "text_encoder", lambda: T5EncoderModel(text), T5_XXL, "T5EncoderModel", "model.safetensors")
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (base / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXImageToVideoPipeline"}))
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    (base / "tokenizer").mkdir()
    tokenizer.save(str(base / "tokenizer" / "tokenizer.json"))
    write_motionrag(root / "rag", {f"transformer.transformer_blocks.{i}.attn1": 3072 for i in range(layers)}, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["cogvideox-5b-i2v"])
    parser.add_argument("work", type=Path, help="folder for the files and the bundle; made anew")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--layers", type=int, default=42, help="fewer: a quick look, no row")
    arguments = parser.parse_args()
    root: Path = arguments.work
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    from motionrt.export.cogvideox_bundle import export_cogvideox

    write_encoders(root)
    write_cogvideox(root, arguments.layers)
    sources = Sources(
        root / "base", root / "rag", root / "videomae", root / "dinov2", root / "converted", sos=SosToken(seed=42),
        steps=(25, 50),
    )
    start, marks = perf_counter(), list[tuple[str, float, int]]()

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    def say(text: str) -> None:
        marks.append((text, round(perf_counter() - start, 1), peak()))
        print(*marks[-1], flush=True)

    export_cogvideox(sources, root / "bundle", frames=arguments.frames, say=say)
    seconds = perf_counter() - start
    manifest = json.loads((root / "bundle" / "bundle.json").read_text())
    files = list((root / "bundle").rglob("*.safetensors"))
    row = {
        "model": arguments.model,
        "frames": arguments.frames,
        "dtype": "bfloat16",
        "weights_read_bytes": sum(f.stat().st_size for f in root.rglob("*.safetensors") if "bundle" not in f.parts),
        "bundle_bytes": sum(f.stat().st_size for f in files),
        "seconds": round(seconds, 1),
        "peak_rss_mb": peak(),
        "begun": [{"graph": name, "seconds": at, "peak_rss_mb": most} for name, at, most in marks],
        "classes": manifest["partition"]["weights"],
        "memory": manifest["provenance"]["memory"],
        "checked": "ONNX checker and strict shape inference passed for every graph; weights were zeros",
    }
    print(json.dumps({key: row[key] for key in ("weights_read_bytes", "bundle_bytes", "seconds", "peak_rss_mb")}))
    if arguments.layers == 42:
        print(append_row("export_full", row))


if __name__ == "__main__":
    main()
