"""Official checkpoints, opened without loading them: diffusers and transformers folders, and `torch.save` files.

    base = open_component(folder, "transformer", "CogVideoXTransformer3DModel")     # header and config only
    tensors, report = check_keys(base.tensors, wanted_shapes, what="transformer", file=folder)  # or CheckpointError
    weight = tensors["proj_out.weight"].read()                                      # one tensor

Nothing here executes what a file holds: pickles are opened with `weights_only=True`, and everything that is not a plain
tensor in a plain container is refused.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from motionrt.export.checkpoints.safetensors_file import CheckpointError, Entry, Stored, read_header, write_file
from motionrt.runtime.files import sha256_of

__all__ = ["CheckpointError", "Component", "KeyReport", "Lazy", "Stored", "check_keys", "open_component", "open_torch_file"]

_STEMS = ("diffusion_pytorch_model", "model")
_SHOWN = 4  # keys named in a message; the report has all of them


class Lazy(Protocol):
    """A tensor that is known by dtype and shape, and read when it is needed."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class InMemory:
    """A tensor that is there already (made here, or mapped by `torch.load`)."""

    value: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self) -> Tensor:
        return self.value


@dataclass(frozen=True)
class KeyReport:
    """What became of the keys of one part: `used`, `missing` (of those wanted), `unexpected`, `ignored` with a reason."""

    what: str
    file: str
    dtype: str
    used: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for people."""
        rest = f", {len(self.ignored)} ignored" if self.ignored else ""
        counts = f"{len(self.used)} keys used, {len(self.missing)} missing, {len(self.unexpected)} unexpected{rest}"
        return f"{self.what}: {counts} ({self.dtype}; {self.file})"


@dataclass(frozen=True)
class Component:
    """One folder of a diffusers or transformers model: its `config` and the places of its tensors."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Lazy]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; `CheckpointError` in plain words."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give the folder as it was downloaded.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download it again.")
    return value


def check_pipeline(folder: Path, pipeline: str) -> dict[str, Any]:
    """`model_index.json` of a diffusers folder; `CheckpointError` unless it is of the class `pipeline`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder. Give the diffusers folder of the base model.")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != pipeline:
        raise CheckpointError(
            f"{folder} holds a {index.get('_class_name')}; this command takes a {pipeline}. Give the folder of that model."
        )
    return index


def open_component(folder: Path, name: str, kind: str | None) -> Component:
    """Subfolder `name` ("" for the folder itself) of a model, headers only. `kind`: the class its config must name."""
    folder = folder / name if name else folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; {kind or 'a model'} is expected there.")
    config = read_json(folder / "config.json")
    found = [config["_class_name"]] if "_class_name" in config else list(config.get("architectures") or [])
    if kind is not None and kind not in found:
        raise CheckpointError(
            f"{folder} holds a {' or '.join(map(str, found)) or 'model without a class'}; {kind} is expected there. "
            "Give the folder of the model family that this command is for."
        )
    return Component(folder, config, open_tensors(folder))


def open_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder: one safetensors file, or an index and its shards (checked against each other)."""
    for stem in _STEMS:
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            return _open_shards(index)
        if single.is_file():
            return read_header(single)[0]
    others = sorted(path.name for pattern in ("*.bin", "*.ckpt", "*.safetensors") for path in folder.glob(pattern))
    pickled = folder / "pytorch_model.bin"
    made = f", or make one: `python -m motionrt.export.checkpoints.files {pickled} {folder / 'model.safetensors'}`"
    raise CheckpointError(
        f"{folder} has no {' or '.join(f'{stem}.safetensors' for stem in _STEMS)} (nor an index of shards)"
        f"{'; it has ' + ', '.join(others) if others else ''}. Download the safetensors files of the model"
        f"{made if pickled.is_file() else ''}."
    )


def _open_shards(index: Path) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} has no weight_map from keys to files. Download it again.")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the file {name!r}; shards must lie beside it.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} lacks {name}, which its index names. Download it too.")
        shard = read_header(index.parent / name)[0]
        for key in shard.keys() ^ {key for key, file in where.items() if file == name}:
            side = "which the index does not place there" if key in shard else "is not there, although the index says so"
            raise CheckpointError(f"{index.parent / name}: key `{key}` {side}. Download index and shards again.")
        tensors |= shard
    return tensors


def open_torch_file(
    path: Path, inside: Sequence[str] = ("state_dict",), settings: Sequence[str] = ()
) -> dict[str, InMemory]:
    """Tensors of a `torch.save` file: a dict of tensors, or one that has such a dict under a name in `inside`, as Lightning's.

    Mapped, not loaded, where the file allows it (torch's zip format). A file whose pickle asks for anything but tensors
    and plain containers is refused: such a file is a program. An entry that `settings` names may be no tensor; it is then given
    as an empty one, so that it can be accounted for as a key.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    try:
        if zipfile.is_zipfile(path):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} was not opened: its pickle holds more than tensors, and would run code ({reason:.300}). "
            "Take the file from its authors' page, or re-save only its tensors on a machine that may run it."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split()):.200}). Download it again.") from None
    for name in inside:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; a dict of tensors is expected.")
    loaded = {key: torch.empty(0) if key in settings and not isinstance(it, Tensor) else it for key, it in loaded.items()}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: `{key}` is a {type(value).__name__}; every entry must be a tensor.")
    return {key: InMemory(value.detach()) for key, value in loaded.items()}


def open_any(path: Path, inside: Sequence[str] = ("state_dict",), settings: Sequence[str] = ()) -> Mapping[str, Lazy]:
    """Tensors of a `.safetensors` file or of a `torch.save` file (see `open_torch_file`)."""
    return read_header(path)[0] if path.suffix == ".safetensors" else open_torch_file(path, inside, settings)


def convert(path: Path, out: Path) -> Mapping[str, Stored]:
    """The `torch.save` file `path` as the safetensors file `out`, tensor by tensor; an `out` of the same bytes is kept."""
    digest = sha256_of(path)
    if out.is_file():
        tensors, metadata = read_header(out)
        if metadata.get("sha256") == digest:
            return tensors
    opened = open_torch_file(path)
    entries = [Entry(key, lazy.dtype, lazy.shape, lazy.read) for key, lazy in opened.items()]
    return write_file(out, entries, {"format": "pt", "source": path.name, "sha256": digest}).tensors


def check_keys(
    tensors: Mapping[str, Lazy],
    wanted: Mapping[str, Sequence[int]],
    *,
    what: str,
    file: Path | str,
    aliases: Mapping[str, str] | None = None,
    ignored: Mapping[str, str] | None = None,
) -> tuple[dict[str, Lazy], KeyReport]:
    """`tensors` under the names `wanted` (name -> shape), and what became of every key.

    `aliases`: wanted name -> the key that stands for it where it is absent (tied weights); `ignored`: keys that may be
    there and are not used, with the reason. Raises `CheckpointError` for a key too many or too few, another shape (both
    are named), or floating-point tensors of more than one dtype.
    """
    aliases, ignored = aliases or {}, ignored or {}
    keys = {name: name if name in tensors else aliases.get(name, name) for name in wanted}
    found = {name: tensors[key] for name, key in keys.items() if key in tensors}
    missing, used = [name for name in wanted if name not in found], {keys[name] for name in found}
    skipped = {key: reason for key, reason in ignored.items() if key in tensors and key not in used}
    unexpected = [key for key in tensors if key not in used and key not in skipped]
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}" if missing else "", f"has the unexpected {_some(unexpected)}" if unexpected else ""]
        raise CheckpointError(
            f"{what} ({file}) {' and '.join(filter(None, parts))}; {len(wanted)} keys are expected, {len(tensors)} are "
            "there. Check that it is the file of this model."
        )
    for name, shape in wanted.items():
        if found[name].shape != tuple(shape):
            raise CheckpointError(
                f"{what} ({file}): `{name}` has the shape {list(found[name].shape)}; {list(shape)} is expected. "
                "Check that file and config belong together."
            )
    dtypes: dict[torch.dtype, str] = {}
    for name, lazy in found.items():
        if lazy.dtype.is_floating_point:
            dtypes.setdefault(lazy.dtype, name)
    if len(dtypes) > 1:
        listed = ", ".join(f"`{name}` is {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items())
        raise CheckpointError(f"{what} ({file}) mixes dtypes: {listed}. Save all its tensors in one of them.")
    dtype = next((str(dtype).removeprefix("torch.") for dtype in dtypes), "no floats")
    return found, KeyReport(what, str(Path(file).name), dtype, tuple(wanted), ignored=skipped)


def _some(keys: Iterable[str]) -> str:
    listed = list(keys)
    names = ", ".join(f"`{key}`" for key in listed[:_SHOWN])
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"key{'s' * (len(listed) > 1)} {names}{more}"


def main(arguments: Sequence[str]) -> None:
    """`python -m motionrt.export.checkpoints.files FROM TO`: a `torch.save` file as safetensors."""
    if len(arguments) != 2:
        raise SystemExit("usage: python -m motionrt.export.checkpoints.files pytorch_model.bin model.safetensors")
    try:
        made = convert(Path(arguments[0]), Path(arguments[1]))
    except CheckpointError as error:
        raise SystemExit(str(error)) from None
    print(f"{arguments[1]}: {len(made)} tensors")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
