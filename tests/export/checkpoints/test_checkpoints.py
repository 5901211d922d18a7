"""Released checkpoints: every key is accounted for, and what does not belong is refused by name before anything is written."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from by_path import load_by_path  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from motionrt.benchmarks.models.sparse_models import sparse_file  # noqa: E402
from motionrt.export.checkpoints import files as checkpoints  # noqa: E402
from motionrt.export.checkpoints import safetensors_file  # noqa: E402
from motionrt.export.checkpoints.files import (  # noqa: E402
    CheckpointError,
    check_keys,
    check_pipeline,
    open_component,
    open_torch_file,
)
from motionrt.export.checkpoints.motionrag_files import (  # noqa: E402
    CamaSize,
    MotionRAG,
    ResamplerSize,
    SosToken,
    adapter_shapes,
    open_motionrag,
    overlay_shapes,
)
from motionrt.export.checkpoints.safetensors_file import Entry, read_header, write_file  # noqa: E402
from motionrt.runtime.files import sha256_of  # noqa: E402

release = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/release_files.py")
BLOCKS = {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(2)}
SEED = SosToken(seed=42)
Files = dict[str, Any]


@pytest.fixture
def files() -> Files:
    states: Files = release.motionrag_states(BLOCKS, overlay=True)
    return states


def opened(folder: Path, files: Files, sos: SosToken | None = SEED) -> MotionRAG:
    return open_motionrag(release.save(folder, files), BLOCKS, overlay=True, sos=sos)


# --- safetensors ----------------------------------------------------------------------------------------------------


def test_header_reads_what_the_library_wrote_and_the_library_what_we_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b.c": torch.arange(7, dtype=torch.int64),
        "half": torch.randn(4, 4).half(),
        "brain": torch.randn(2, 3, 2).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    header, metadata = read_header(tmp_path / "theirs.safetensors")
    assert metadata == {"format": "pt"}
    entries = [Entry(k, v.dtype, tuple(v.shape), lambda v=v: v) for k, v in tensors.items()]
    ours = write_file(tmp_path / "ours.safetensors", entries, {"who": "us"}).tensors
    again = load_file(tmp_path / "ours.safetensors")
    for key, value in tensors.items():
        assert torch.equal(header[key].read(), value) and header[key].dtype == value.dtype
        assert torch.equal(again[key], value) and torch.equal(ours[key].read(), value)


def test_written_tensors_are_aligned_and_made_one_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    def make(name: str, size: int) -> Callable[[], Any]:
        def call() -> Any:
            alive.append(name)
            return torch.full((size,), float(len(alive)))

        return call

    entries = [Entry(n, torch.float32, (size,), make(n, size)) for n, size in (("odd", 3), ("x", 16), ("y", 32))]
    written = write_file(tmp_path / "w.safetensors", entries)
    where = written.tensors
    assert alive == ["x", "y", "odd"] and written.sha256 == sha256_of(tmp_path / "w.safetensors")
    assert where["x"].offset % 64 == 0 and where["y"].offset % 64 == 0


def test_a_file_that_shrank_since_its_header_was_read_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"weight": torch.ones(100, 100)}, path)
    stored = read_header(path)[0]["weight"]
    changed = stored.read()
    changed.zero_()  # a copy of its own as soon as it is written to
    assert stored.read().all()
    with path.open("r+b") as file:
        file.truncate(stored.offset + stored.size - 4)
    with pytest.raises(CheckpointError, match="ends inside the tensor `weight`"):
        stored.read()


def test_write_refuses_a_tensor_that_is_not_as_declared_and_leaves_nothing(tmp_path: Path) -> None:
    entries = [Entry("a", torch.float32, (4,), lambda: torch.zeros(5))]
    with pytest.raises(ValueError, match=r"`a` is torch.float32 \(5,\); declared torch.float32 \(4,\)"):
        write_file(tmp_path / "w.safetensors", entries)
    assert not list(tmp_path.iterdir())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cut=st.integers(0, 10_000))
def test_a_file_cut_anywhere_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.safetensors"
    save_file({"weight": torch.zeros(16, 16), "bias": torch.zeros(16)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(CheckpointError, match="no intact safetensors file"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, r"`w` is F32 \[2\]"),
        ({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, "entry of `w`"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, "`w` is"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "`w` begins at"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "its tensors end at"),
        ([], "no JSON object"),
    ],
    ids=["size", "dtype", "negative", "hole", "trailing", "list"],
)
def test_a_header_that_lies_is_refused(header: Any, why: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match=why):
        read_header(path)


def test_sparse_files_are_zeros_of_the_declared_shapes(tmp_path: Path) -> None:
    sparse_file(tmp_path / "s.safetensors", {"w": (1000, 1000), "b": (3,)}, torch.bfloat16)
    header, _ = read_header(tmp_path / "s.safetensors")
    assert header["w"].shape == (1000, 1000) and not header["b"].read().any()
    assert (tmp_path / "s.safetensors").stat().st_blocks * 512 < 100_000


# --- diffusers folders ----------------------------------------------------------------------------------------------


def component(folder: Path, kind: str, shards: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": kind}))
    where = {}
    for number, tensors in enumerate(shards):
        name = f"diffusion_pytorch_model-{number}.safetensors" if len(shards) > 1 else "diffusion_pytorch_model.safetensors"
        save_file(tensors, folder / name)
        where |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_component_of_shards_reads_every_key_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    component(tmp_path / "transformer", "Net", [{"a": torch.ones(2)}, {"b": torch.full((3,), 2.0)}])
    reads: list[str] = []
    plain = safetensors_file.Stored.read
    monkeypatch.setattr(safetensors_file.Stored, "read", lambda self: (reads.append(self.key), plain(self))[1])
    found = open_component(tmp_path, "transformer", "Net")
    assert set(found.tensors) == {"a", "b"} and not reads
    assert found.tensors["b"].read().tolist() == [2, 2, 2] and reads == ["b"]


def test_component_refuses_what_is_not_there_or_another_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        open_component(tmp_path, "transformer", "Net")
    folder = component(tmp_path / "transformer", "OtherNet", [{"a": torch.ones(2)}])
    with pytest.raises(CheckpointError, match="holds a OtherNet; Net is expected"):
        open_component(tmp_path, "transformer", "Net")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model.safetensors.*it has pytorch_model.bin"):
        open_component(tmp_path, "transformer", "OtherNet")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        open_component(tmp_path, "transformer", "OtherNet")


@pytest.mark.parametrize("damage", ["shard gone", "key gone", "key elsewhere", "outside"])
def test_shards_that_do_not_fit_their_index_are_refused(damage: str, tmp_path: Path) -> None:
    folder = component(tmp_path / "net", "Net", [{"a": torch.ones(2)}, {"b": torch.ones(3)}])
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    if damage == "shard gone":
        (folder / where["b"]).unlink()
    elif damage == "key gone":
        where["c"] = where["b"]
    elif damage == "key elsewhere":
        save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / where["a"])
    else:
        where["b"] = "../b.safetensors"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match="lacks|key `[bc]`|beside it"):
        open_component(tmp_path, "net", "Net")


def test_pipeline_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no model_index.json"):
        check_pipeline(tmp_path, "CogVideoXImageToVideoPipeline")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="holds a StableVideoDiffusionPipeline; this command takes a CogVideoX"):
        check_pipeline(tmp_path, "CogVideoXImageToVideoPipeline")


def test_match_uses_aliases_ignores_with_a_reason_and_reports_every_key(tmp_path: Path) -> None:
    save_file({"shared": torch.ones(4, 2), "position_ids": torch.arange(3), "w": torch.ones(2)}, tmp_path / "m.safetensors")
    tensors = read_header(tmp_path / "m.safetensors")[0]
    found, report = check_keys(
        tensors, {"shared": (4, 2), "embed": (4, 2), "w": (2,)}, what="T5", file=tmp_path / "m.safetensors",
        aliases={"embed": "shared"}, ignored={"position_ids": "a range", "absent": "never there"},
    )  # fmt: skip
    assert found["embed"].read().shape == (4, 2)
    assert report.used == ("shared", "embed", "w") and dict(report.ignored) == {"position_ids": "a range"}
    assert report.summary() == "T5: 3 keys used, 0 missing, 0 unexpected, 1 ignored (float32; m.safetensors)"


# --- torch files ----------------------------------------------------------------------------------------------------


class Attack:
    """A pickle that would run code when it is opened."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("attacked"), "yes"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_not_run(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Attack()}, "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="a.ckpt was not opened: its pickle holds more than tensors"):
        open_torch_file(Path("a.ckpt"))
    Path("plain.ckpt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"plain.ckpt (was not opened|cannot be read)"):
        open_torch_file(Path("plain.ckpt"))
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 not a zip", {"state_dict": {}}, {"w": "text"}, [torch.ones(1)], {1: torch.ones(1)}],
    ids=["empty", "broken", "no keys", "text", "list", "number key"],
)
def test_torch_files_that_are_no_tensors_by_name_are_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "f.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match="f.ckpt"):
        open_torch_file(path)


def test_a_cut_torch_file_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, buffer)
    (tmp_path / "f.ckpt").write_bytes(buffer.getvalue()[:2500])
    with pytest.raises(CheckpointError, match="f.ckpt"):
        open_torch_file(tmp_path / "f.ckpt")


def test_a_model_published_as_a_pickle_is_converted_by_the_command_that_the_error_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refused:
        open_component(tmp_path, "", None)
    named = re.search("`python -m motionrt.export.checkpoints.files (.*)`", str(refused.value))
    assert named is not None
    checkpoints.main(named[1].split())
    assert "2 tensors" in capsys.readouterr().out
    assert open_component(tmp_path, "", None).tensors["a"].read().tolist() == [0, 1, 2]
    with pytest.raises(SystemExit, match="usage: "):
        checkpoints.main([])
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(SystemExit, match="was not opened|cannot be read"):
        checkpoints.main(named[1].split())


# --- MotionRAG's files ----------------------------------------------------------------------------------------------


def test_released_files_load_key_for_key(files: Files, tmp_path: Path) -> None:
    parts = opened(tmp_path, files)
    assert len(parts.adapter) == 6 and len(parts.overlay) == 12
    key = "transformer.transformer_blocks.1.attn1.processor.to_q_ip.0.weight"
    assert torch.equal(parts.adapter[key].read(), files["Motion-Adapter.ckpt"]["state_dict"][key])
    for size, part in (
        (parts.motion_size, parts.motion_proj), (parts.appearance_size, parts.appearance_proj), (parts.cama_size, parts.cama)
    ):  # fmt: skip
        size.build().load_state_dict({name: lazy.read() for name, lazy in part.items()}, strict=True)
    used = sum(len(report.used) for report in parts.reports)
    assert used == 6 + 29 + 12 + 18 + 24  # adapters, Resampler of depth 2, 17 frames, Resampler of depth 1, 2 layers


def test_expected_keys_at_full_size_are_those_of_the_release() -> None:
    def count(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        return len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())

    blocks = {f"transformer.transformer_blocks.{i}.attn1": 3072 for i in range(42)}
    assert count(adapter_shapes(blocks, 1024)) == (126, 660_602_880)
    assert count(overlay_shapes(blocks)) == (252, 1_189_472_256)
    with torch.device("meta"):
        for size, want in (
            (ResamplerSize(1024, 4, 12, 25, 768, 1024, 4), (51, 48_026_624)),
            (ResamplerSize(1024, 4, 12, 25, 1024, 1024, 4), (51, 48_288_768)),
            (CamaSize(25, 1024, 4, 16, 4096), (49, 50_384_896 + 25 * 1024)),
        ):
            assert count({key: value.shape for key, value in size.build().state_dict().items()}) == want


@pytest.mark.parametrize("prefix", ["action_proj_model.", "vision_proj.", "condition_transformer.vision_proj."])
def test_prefixes_and_containers_of_the_release_are_accepted(prefix: str, files: Files, tmp_path: Path) -> None:
    plain = opened(tmp_path / "plain", files)
    files["motion_proj.ckpt"] = {f"{prefix}{key}": value for key, value in files["motion_proj.ckpt"].items()}
    inner = files["motion_transformer.ckpt"]["state_dict"]
    files["motion_transformer.ckpt"] = {f"condition_transformer.{key}": value for key, value in inner.items()}
    other = opened(tmp_path / "other", files)
    for name in ("motion_proj", "appearance_proj", "cama"):
        theirs = getattr(other, name)
        assert all(torch.equal(lazy.read(), theirs[key].read()) for key, lazy in getattr(plain, name).items())


def test_motion_proj_may_come_from_the_adapter_file_or_the_adapter_file_may_lack_it(files: Files, tmp_path: Path) -> None:
    alone = dict(files)
    want = alone.pop("motion_proj.ckpt")
    parts = opened(tmp_path / "adapter", alone)
    assert torch.equal(parts.motion_proj["latents"].read(), want["latents"])
    state = files["Motion-Adapter.ckpt"]["state_dict"]
    bare = {key: value for key, value in state.items() if not key.startswith("action_proj_model.")}
    parts = opened(tmp_path / "bare", files | {"Motion-Adapter.ckpt": bare})
    assert torch.equal(parts.motion_proj["latents"].read(), want["latents"])
    with pytest.raises(CheckpointError, match="no motion_proj.ckpt"):
        opened(tmp_path / "neither", alone | {"Motion-Adapter.ckpt": bare})


def test_sos_token_is_the_saved_one_or_an_explicit_recorded_choice(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no `sos_token` \[1, 3, 64\].*--sos-token seed:42"):
        opened(tmp_path / "a", files, None)
    drawn = opened(tmp_path / "a", files, SosToken.parse("seed:42"))
    draw = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(42)) / 8
    assert torch.equal(drawn.cama["sos_token"].read(), draw) and drawn.sos["source"] == "seed 42"
    assert opened(tmp_path / "a", files, SosToken.parse("seed:43")).sos["sha256"] != drawn.sos["sha256"]
    save_file({"sos_token": draw}, tmp_path / "sos.safetensors")
    from_file = opened(tmp_path / "a", files, SosToken.parse(str(tmp_path / "sos.safetensors")))
    assert from_file.sos == {"source": "file sos.safetensors", "sha256": drawn.sos["sha256"]}
    save_file({"sos_token": draw[:, :2].contiguous()}, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"`sos_token` has the shape \[1, 2, 64\]; \[1, 3, 64\] is expected"):
        opened(tmp_path / "a", files, SosToken.parse(str(tmp_path / "short.safetensors")))
    with pytest.raises(CheckpointError, match="seed:NUMBER"):
        SosToken.parse("seed:-1")
    files["motion_transformer.ckpt"]["state_dict"]["sos_token"] = torch.ones(1, 3, 64)
    assert opened(tmp_path / "b", files, None).sos["source"] == "checkpoint"
    assert opened(tmp_path / "b", files, SEED).sos["source"] == "seed 42"


DAMAGES: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "a key too few": (
        "Motion-Adapter", lambda s: s.pop("transformer.transformer_blocks.1.attn1.processor.to_v_ip.0.weight"),
        r"lacks key `transformer.transformer_blocks.1.attn1.processor.to_v_ip.0.weight`",
    ),
    "a key too many": ("17_frames", lambda s: s.update(extra=torch.ones(1)), "has the unexpected key `extra`"),
    "a block too many": (
        "17_frames", lambda s: s.update({"transformer.transformer_blocks.2.attn1.to_q.bias": torch.ones(64)}),
        "has the unexpected key `transformer.transformer_blocks.2.attn1.to_q.bias`",
    ),
    "a shape off by one": (
        "17_frames", lambda s: s.update({"transformer.transformer_blocks.0.attn1.to_q.weight": torch.ones(64, 65)}),
        r"`transformer.transformer_blocks.0.attn1.to_q.weight` has the shape \[64, 65\]; \[64, 64\] is expected",
    ),
    "an adapter of another width": (
        "Motion-Adapter",
        lambda s: s.update({k: torch.ones(64, 63) for k in s if "to_k_ip" in k or "to_v_ip" in k}),
        "token widths are motion_proj 64, condition_proj 64, transformer 64, Motion-Adapter 63",
    ),
    "a Resampler off by one": (
        "motion_proj", lambda s: s.update({"layers.1.0.to_kv.weight": torch.ones(127, 64)}),
        r"`layers.1.0.to_kv.weight` has the shape \[127, 64\]; \[128, 64\] is expected",
    ),
    "another Resampler in the adapter file": (
        "Motion-Adapter", lambda s: s.update({"action_proj_model.latents": torch.ones(1, 4, 64)}),
        r"`latents` has the shape \[1, 4, 64\]; \[1, 3, 64\]",
    ),
    "a CAMA layer short": (
        "motion_transformer", lambda s: s.pop("transformer.layers.1.norm2.bias"), "lacks key `transformer.layers.1.norm2.bias`"
    ),
    "mixed dtypes": (
        "motion_transformer", lambda s: s.update({"transformer.layers.0.norm1.bias": torch.ones(64).bfloat16()}),
        r"mixes dtypes: `transformer.layers.0.\S+` is float32, `transformer.layers.0.norm1.bias` is bfloat16",
    ),
    "another file": ("motion_proj", lambda s: (s.clear(), s.update(foo=torch.ones(1))), "has no key `latents…`.*`foo`"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_releases_are_refused_by_key_and_shapes(damage: str, files: Files, tmp_path: Path) -> None:
    name, change, message = DAMAGES[damage]
    entry = files[f"{name}.ckpt"]
    change(entry.get("state_dict", entry))
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, files)


def test_a_missing_file_names_those_that_are_there(files: Files, tmp_path: Path) -> None:
    del files["17_frames.ckpt"]
    with pytest.raises(CheckpointError, match=r"has no 17_frames.ckpt; it has Motion-Adapter.ckpt, motion_proj.ckpt"):
        opened(tmp_path, files)
    with pytest.raises(CheckpointError, match="is no folder"):
        open_motionrag(tmp_path / "nowhere", BLOCKS, overlay=True)


def test_safetensors_of_the_same_tensors_are_taken_too_and_ckpt_files_are_mapped_and_not_loaded(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = release.save(tmp_path / "source", files), tmp_path / "converted"
    load, mapped = torch.load, list[object]()
    monkeypatch.setattr(torch, "load", lambda *args, **options: mapped.append(options.get("mmap")) or load(*args, **options))
    before = opened(source, files)
    assert mapped and all(mapped)
    for path in source.iterdir():
        checkpoints.convert(path, out / f"{path.stem}.safetensors")
    after = open_motionrag(out, BLOCKS, overlay=True, sos=SEED)
    for part in ("adapter", "overlay", "motion_proj", "appearance_proj", "cama"):
        ours = getattr(after, part)
        assert all(torch.equal(lazy.read(), ours[key].read()) for key, lazy in getattr(before, part).items()), part
    assert all(isinstance(lazy, safetensors_file.Stored) for lazy in after.adapter.values())


def test_a_conversion_is_done_once_and_again_for_another_file_under_the_old_name(files: Files, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "17_frames.safetensors"
    key = "transformer.transformer_blocks.0.attn1.to_q.bias"
    for count in (0, 1):
        checkpoints.convert(release.save(source, files) / "17_frames.ckpt", out)
        stamp = out.stat().st_mtime_ns
        checkpoints.convert(source / "17_frames.ckpt", out)
        assert out.stat().st_mtime_ns == stamp, count
        held = files["17_frames.ckpt"]["state_dict"]
        assert torch.equal(read_header(out)[0][key].read(), held[key])
        held[key] = held[key] + 1
