"""Bundles and motion memories in ComfyUI's folder `models/motionrt`, by name, and opened pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import folder_paths

from motionrt import MotionMemory, MotionPipeline
from motionrt.runtime.bundle.manifest import Manifest, read_manifest
from motionrt.runtime.errors import InputError, MotionRTError
from motionrt.runtime.memory.set import MemorySet

FOLDER = "motionrt"
BUNDLE, MEMORY = "bundle.json", "memory.sqlite"  # what a bundle's folder holds, and a memory's
_DEEP = 4  # folders between `models/motionrt` and these files
_open: WeakValueDictionary[tuple[object, ...], MotionPipeline] = WeakValueDictionary()


def folders(file: str) -> dict[str, Path]:
    """The folders that hold `file`, by their names from `models/motionrt` on; links are followed, hidden ones left out."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    homes = map(Path, folder_paths.get_folder_paths(FOLDER))  # several where extra_model_paths.yaml names more
    every = [(home, path.parent) for home in homes for deep in range(1, _DEEP + 1) for path in home.glob("*/" * deep + file)]
    named = {path.relative_to(home).as_posix(): path for home, path in reversed(every)}
    return {name: named[name] for name in sorted(named) if "/." not in f"/{name}"}


def manifests() -> Iterator[Manifest]:
    """What each bundle declares, one for each name that a bundle says it has; what cannot be read is left out."""
    seen = set[str]()
    for path in folders(BUNDLE).values():
        try:
            manifest = read_manifest(path / BUNDLE)
        except MotionRTError:
            continue  # the node that opens it says why
        if manifest.name not in seen:
            seen.add(manifest.name)
            yield manifest


def folder_of(file: str, name: str) -> Path:
    """The folder of a bundle or memory by its name; `InputError` for one that is not there."""
    there = folders(file)
    if name not in there:
        what = "bundle" if file == BUNDLE else "motion memory"
        names = ", ".join(there) or "none"
        home = os.path.join(folder_paths.models_dir, FOLDER)
        raise InputError(f"the {what} is {name!r}; there are: {names}. Put its folder, or a link to it, into {home}.")
    return there[name]


def stamp(bundle: str, memories: list[str]) -> tuple[object, ...]:
    """What changes when one of these was changed on disk."""
    files = [folder_of(BUNDLE, bundle) / BUNDLE, *(folder_of(MEMORY, name) / MEMORY for name in memories)]
    return tuple((str(file), (told := file.stat()).st_mtime_ns, told.st_size) for file in files)


def pipeline(bundle: str, memories: list[str], backend: str) -> MotionPipeline:
    """The pipeline of these, the one that is open already as long as a node holds it and nothing changed on disk."""
    key = (backend, *stamp(bundle, memories))
    if (there := _open.get(key)) is not None:
        return there
    paths = {name: folder_of(MEMORY, name) for name in memories}
    memory: Path | MemorySet | None = next(iter(paths.values()), None)
    if len(paths) > 1:
        memory = MemorySet({name: MotionMemory.open(path, readonly=True) for name, path in paths.items()})
    made = _open[key] = MotionPipeline.from_bundle(folder_of(BUNDLE, bundle), memory, backend=backend)
    return made
