"""`motionrt export` with one thing wrong in one file: refused by name, key and both shapes, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from motionrt.export.systems.svd import adapter_blocks  # noqa: E402

Run = Callable[..., tuple[int, str, str]]
HERE = Path(__file__).parent
models = load_by_path(Path(__file__).resolve().parents[2] / "tests/helpers/tiny_models.py")
sentence = load_by_path(Path(__file__).resolve().parents[2] / "tests/export/checkpoints/test_text_query.py")
COGVIDEOX, SVD = "cogvideox-5b-i2v", "svd"
PARTS = {  # files of a download -> where their tensors are
    "transformer": "base/transformer/diffusion_pytorch_model.safetensors",
    "unet": "base/unet/diffusion_pytorch_model.safetensors",
    "vae": "base/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "base/text_encoder/model.safetensors",
    "image_encoder": "base/image_encoder/model.safetensors",
    "videomae": "videomae/model.safetensors",
    "dinov2": "dinov2/model.safetensors",
    "text_query": "text_query/model.safetensors",
    **{stem: f"rag/{stem}.ckpt" for stem in ("Motion-Adapter", "motion_proj", "motion_transformer", "17_frames")},
}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as they are downloaded, whole: model -> root. Copied before anything is changed."""
    roots = {name: tmp_path_factory.mktemp(name) for name in (COGVIDEOX, SVD)}
    models.write_cogvideox(roots[COGVIDEOX] / "base")
    models.write_svd(roots[SVD] / "base")
    blocks = {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(2)}
    for name, root in roots.items():
        models.write_encoders(root)
        overlay = name == COGVIDEOX
        models.release.save(
            root / "rag",
            models.release.motionrag_states(blocks if overlay else adapter_blocks(models.UNET), overlay=overlay),
        )
        sentence.write_gte(root / "text_query")
    return roots


@dataclass(frozen=True)
class Bad:
    """`damage` of `part` of `model`'s download, and what the error says."""

    model: str
    part: str
    damage: str
    says: str

    def __str__(self) -> str:
        return f"{self.model[:3]} {self.part} {self.damage}"


def shapes(key: str, got: str, wanted: str) -> str:
    return rf"`{key}` has the shape \[{got}\]; \[{wanted}\] is expected"


CASES = [
    Bad(COGVIDEOX, "base", "wrong folder", "has no model_index.json"),
    Bad(SVD, "base", "wrong folder", "has no model_index.json"),
    Bad(COGVIDEOX, "videomae", "wrong folder", "has no config.json"),
    Bad(COGVIDEOX, "base", "other family", "holds a StableVideoDiffusionPipeline; this command takes a CogVideoXImageToVideo"),
    Bad(SVD, "base", "other family", "holds a CogVideoXImageToVideoPipeline; this command takes a StableVideoDiffusion"),
    Bad(COGVIDEOX, "videomae", "other family", "holds a dinov2 model; a videomae model is expected"),
    Bad(SVD, "dinov2", "other family", "holds a VideoMAEForVideoClassification; Dinov2Model is expected"),
    Bad(SVD, "rag", "other family", "Motion-Adapter .* lacks keys `unet"),
    Bad(COGVIDEOX, "transformer", "key gone", "transformer .* lacks key `proj_out.bias`"),
    Bad(SVD, "unet", "key gone", "unet .* lacks key `conv_out.bias`"),
    Bad(COGVIDEOX, "17_frames", "key gone", r"17_frames .* lacks key `transformer\.transformer_blocks\.1\.attn1\.to_v\.bias`"),
    Bad(SVD, "Motion-Adapter", "key gone", r"Motion-Adapter .* lacks key `unet\.\S+to_v_ip\.0\.weight`"),
    Bad(SVD, "text_query", "key gone", "text_query .* lacks key `encoder.layer.1.mlp_ln.weight`"),
    Bad(COGVIDEOX, "vae", "key more", "vae .* has the unexpected key `extra`"),
    Bad(SVD, "image_encoder", "key more", "image_encoder .* has the unexpected key `extra`"),
    Bad(COGVIDEOX, "motion_transformer", "key more", "motion_transformer .* has the unexpected key `extra`"),
    Bad(COGVIDEOX, "text_encoder", "shape", shapes(r"shared\.weight", "41, 16", "40, 16")),
    Bad(COGVIDEOX, "Motion-Adapter", "shape", shapes(r"\S+attn1\.processor\.to_q_ip\.0\.weight", "65, 64", "64, 64")),
    Bad(COGVIDEOX, "dinov2", "shape", shapes(r"\S+cls_token", "2, 1, 48", "1, 1, 48")),
    Bad(SVD, "vae", "shape", shapes(r"decoder\.conv_in\.bias", "33", "32")),
    Bad(SVD, "motion_proj", "shape", shapes(r"proj_in\.bias", "65", "64")),
    Bad(COGVIDEOX, "transformer", "dtypes", "transformer .* mixes dtypes: `.*` is float32, `.*` is float16"),
    Bad(SVD, "motion_transformer", "dtypes", "condition_proj .* mixes dtypes: `.*` is float32, `.*` is float16"),
    Bad(COGVIDEOX, "videomae", "dtypes", "VideoMAE .* mixes dtypes: `.*` is float32, `.*` is float16"),
    Bad(COGVIDEOX, "vae", "cut", "no intact safetensors file"),
    Bad(SVD, "unet", "cut", "no intact safetensors file"),
    Bad(COGVIDEOX, "Motion-Adapter", "cut", r"Motion-Adapter\.ckpt cannot be read"),
    Bad(COGVIDEOX, "17_frames", "code", r"17_frames\.ckpt was not opened: its pickle holds more than tensors"),
    Bad(SVD, "motion_proj", "code", r"motion_proj\.ckpt was not opened: its pickle holds more than tensors"),
    Bad(SVD, "unet", "code", r"has no diffusion_pytorch_model\.safetensors.*it has diffusion_pytorch_model\.bin"),
]
LATE = {"vae", "text_encoder", "dinov2", "videomae", "text_query"}  # read after the other parts: slow, and alike
KEYS = {  # the key of each part that is taken away or gets one row more
    "transformer": "proj_out.bias", "unet": "conv_out.bias", "vae": "decoder.conv_in.bias", "text_encoder": "shared.weight",
    "dinov2": "cls_token", "motion_proj": "proj_in.bias", "17_frames": "blocks.1.attn1.to_v.bias",
    "Motion-Adapter": "to_v_ip.0.weight", "text_query": "encoder.layer.1.mlp_ln.weight",
}  # fmt: skip


def options(root: Path) -> list[object]:
    """The command's options for the folders of a download."""
    names = {"base": "base", "motionrag": "rag", "videomae": "videomae", "dinov2": "dinov2", "text-query": "text_query"}
    return [part for name, folder in names.items() for part in (f"--{name}", root / folder)]


class Attack:
    """A pickle that would run code when it is opened."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("attacked"), "yes"))


def spoil(root: Path, bad: Bad, downloads: dict[str, Path]) -> None:
    """Do the damage in the copy `root`."""
    folder = root / bad.part
    if bad.damage == "wrong folder":
        shutil.rmtree(folder)
        folder.mkdir()
        return
    if bad.damage == "other family":
        other = {"videomae": root / "dinov2", "dinov2": root / "videomae"}.get(bad.part)
        source = other or downloads[SVD if bad.model == COGVIDEOX else COGVIDEOX] / bad.part
        shutil.copytree(source, root / "other")
        shutil.rmtree(folder)
        (root / "other").rename(folder)
        return
    path = root / PARTS[bad.part]
    if bad.damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif bad.damage == "code":
        if path.suffix == ".safetensors":
            path.unlink()
            path = path.with_suffix(".bin")
        torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": Attack()}, path)
    else:
        tensors = path.suffix == ".safetensors"
        held = load_file(path) if tensors else torch.load(path, weights_only=True)
        change(held.get("state_dict", held), bad)
        save_file(held, path, metadata={"format": "pt"}) if tensors else torch.save(held, path)


def change(state: dict[str, Any], bad: Bad) -> None:
    if bad.damage == "key more":
        state["extra"] = torch.ones(1)
    elif bad.damage == "key gone":
        del state[[key for key in state if key.endswith(KEYS[bad.part])][-1]]
    elif bad.damage == "shape":
        ending = "to_q_ip.0.weight" if bad.part == "Motion-Adapter" else KEYS[bad.part]
        key = next(key for key in state if key.endswith(ending))
        state[key] = torch.cat([state[key], state[key][:1]])
    else:
        key = [key for key in state if "condition_proj" in key or bad.part != "motion_transformer"][-1]
        state[key] = state[key].half()


@pytest.mark.parametrize("bad", [pytest.param(bad, marks=[pytest.mark.slow] * (bad.part in LATE)) for bad in CASES], ids=str)
def test_a_download_with_one_fault_is_refused_before_anything_is_written(
    bad: Bad, downloads: dict[str, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(downloads[bad.model], tmp_path / "in"))
    spoil(root, bad, downloads)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    folders = options(root)
    before = sorted(path.name for path in root.rglob("*"))
    status, out, err = run(
        "export", bad.model, *folders, "--dtype", "float32", "--sos-token", "seed:42", "-o", tmp_path / "out" / "bundle"
    )
    assert status == 2 and "Traceback" not in out + err
    said = " ".join(err.split())
    assert re.search(bad.says, said), said
    assert not list((tmp_path / "out").iterdir()), "something was written"
    assert sorted(path.name for path in root.rglob("*")) == before


@pytest.mark.slow
def test_a_whole_download_gets_past_the_checks(
    downloads: dict[str, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases above are refused for their fault, and not because nothing would be accepted; no file is opened after that."""
    from motionrt.export import exporter
    from motionrt.export.checkpoints import files

    class Reached(Exception):
        pass

    opened: list[str] = []
    for module, name in ((files, "read_header"), (files, "open_torch_file")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *rest, plain=plain: opened.append(str(path)) or plain(path, *rest))

    def stop(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setattr(exporter, "replacing_folder", stop)
    for name, root in downloads.items():
        opened.clear()
        command = ("export", name, *options(root), "--dtype", "float32", "--sos-token", "seed:42", "-o", tmp_path / "bundle")
        status, _, err = run(*command)
        assert status == 1 and "Reached" in err, err
        assert len(opened) == len(set(opened)), "a file was opened twice"
        assert {Path(path).stem for path in opened} >= {"Motion-Adapter", "motion_transformer", "model"}
    assert not list(tmp_path.iterdir()) and json.loads((root / "base" / "model_index.json").read_text())
