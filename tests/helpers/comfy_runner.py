"""ComfyUI in one process, on its stand-in: folders, nodes of its own, and workflows in the API format.

    comfy = Comfy(tmp_path)                          # its folders: models, input, output, temp
    with comfy.installed():
        comfy.load(ROOT / "integrations/comfyui")    # as from custom_nodes
        comfy.run(json.loads(workflow.read_text()))  # node -> what it gave

What ComfyUI refuses is refused: a link of another type, a missing input, a value that is not among a combo's options or outside
of a number's range. And also what it would only ignore: an input of another name.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy_stand_in as api
import numpy as np
import torch
from comfy_stand_in import ComfyNode, NodeOutput, Schema, io
from PIL import Image

_NAME = "comfy-node:"  # begins the names of modules of nodes; as ComfyUI has it, there is no dot before a package's own


def core(folder: Path) -> dict[str, type[ComfyNode]]:
    """The nodes of ComfyUI that example workflows use, with the names of its own."""

    class LoadImage(ComfyNode):
        @classmethod
        def define_schema(cls) -> Schema:
            files = io.Combo.Input("image", options=[path.name for path in (folder / "input").iterdir()])
            return Schema("LoadImage", inputs=[files], outputs=[io.Image.Output(), io.Mask.Output("MASK")])

        @classmethod
        def execute(cls, image: str) -> NodeOutput:
            pixels = np.asarray(Image.open(folder / "input" / image).convert("RGBA"), np.float32) / 255
            return NodeOutput(torch.from_numpy(pixels[None, ..., :3]), torch.from_numpy(1 - pixels[None, ..., 3]))

    class LoadVideo(ComfyNode):
        @classmethod
        def define_schema(cls) -> Schema:
            files = io.Combo.Input("file", options=[path.name for path in (folder / "input").iterdir()])
            return Schema("LoadVideo", inputs=[files], outputs=[io.Video.Output()])

        @classmethod
        def execute(cls, file: str) -> NodeOutput:
            return NodeOutput(api.VideoFromFile(str(folder / "input" / file)))

    class SaveVideo(ComfyNode):
        @classmethod
        def define_schema(cls) -> Schema:
            # `codec` until 2026, then `format.codec`: each ignores the other.
            combos = {"format": "mp4", "codec": "h264", "format.codec": "h264"}
            auto = [io.Combo.Input(name, options=["auto", other], optional="." in name) for name, other in combos.items()]
            prefix = io.String.Input("filename_prefix", default="video/ComfyUI")
            return Schema("SaveVideo", inputs=[io.Video.Input("video"), prefix, *auto], is_output_node=True)

        @classmethod
        def execute(cls, video: Any, filename_prefix: str, **auto: str) -> NodeOutput:
            path = folder / "output" / f"{filename_prefix}_00001_.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            video.save_to(str(path))
            return NodeOutput(path)

    class PreviewImage(ComfyNode):
        @classmethod
        def define_schema(cls) -> Schema:
            return Schema("PreviewImage", inputs=[io.Image.Input("images")], is_output_node=True)

        @classmethod
        def execute(cls, images: torch.Tensor) -> NodeOutput:
            assert images.ndim == 4 and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
            return NodeOutput(images)

    return {node.__name__: node for node in (LoadImage, LoadVideo, SaveVideo, PreviewImage)}


class Comfy:
    """ComfyUI with its folders in `folder`."""

    def __init__(self, folder: Path) -> None:
        for name in ("models", "input", "output", "temp", "custom_nodes"):
            (folder / name).mkdir()
        self.folder, self.stop_after, self._cache = folder, -1, dict[str, tuple[Any, ...]]()
        self.ran: list[str] = []  # the nodes that were executed
        self.nodes = core(folder)
        self._homes: dict[str, list[str]] = {}
        api.ProgressBar.shown.clear()

    def load(self, package: Path) -> None:
        """Import a folder of nodes, as from custom_nodes, and ask it for them."""
        spec = importlib.util.spec_from_file_location(_NAME + str(package).replace(".", "_x_"), package / "__init__.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)

        async def listed() -> list[type[ComfyNode]]:
            extension = await module.comfy_entrypoint()
            assert isinstance(extension, api.ComfyExtension)
            await extension.on_load()
            return list(await extension.get_node_list())

        self.nodes |= {node.define_schema().node_id: node for node in asyncio.run(listed())}

    def run(self, workflow: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
        """What each node of a workflow gives; nodes whose inputs are what they were are not run again."""
        for key, node in workflow.items():
            self._check(key, node, workflow)
        gave: dict[str, tuple[Any, ...]] = {}
        keys: dict[str, str] = {}

        def of(key: str) -> tuple[Any, ...]:
            if key not in gave:
                node = workflow[key]
                links = {name: one for name, one in node["inputs"].items() if isinstance(one, list)}
                values = {name: one for name, one in node["inputs"].items() if name not in links}
                inputs = values | {name: of(source)[slot] for name, (source, slot) in links.items()}
                kind = self.nodes[node["class_type"]]
                changed = kind.fingerprint_inputs(**values) if not links else None
                sources = {name: (keys[source], slot) for name, (source, slot) in links.items()}
                keys[key] = repr((node["class_type"], sorted(values.items()), sorted(sources.items()), changed))
                if keys[key] not in self._cache:
                    self.ran.append(node["class_type"])
                    made = kind.execute(**inputs)
                    count = len(kind.define_schema().outputs)
                    assert isinstance(made, NodeOutput) and len(made.values) >= count
                    self._cache[keys[key]] = made.values
                gave[key] = self._cache[keys[key]]
            return gave[key]

        return {key: of(key) for key in workflow}

    def _check(self, key: str, node: dict[str, Any], workflow: dict[str, Any]) -> None:
        assert node["class_type"] in self.nodes, f"{node['class_type']} is no node; there are {sorted(self.nodes)}"
        takes = {put.id: put for put in self.nodes[node["class_type"]].define_schema().inputs}
        needed = {name for name, put in takes.items() if not put.optional}
        wrong = (needed - node["inputs"].keys()) | (node["inputs"].keys() - takes.keys())
        assert not wrong, f"node {key} misses these, or does not take them: {wrong}"
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source = self.nodes[workflow[value[0]]["class_type"]].define_schema()
                assert source.outputs[value[1]].io_type == takes[name].io_type, f"node {key}: {name} is linked to another type"
            else:
                refused = takes[name].check(value)
                assert refused is None, f"node {key}: {name}: {refused}"

    # --- modules ------------------------------------------------------------------------------------------------------

    def throw_exception_if_processing_interrupted(self) -> None:
        """As ComfyUI's; a stop comes when this was asked `stop_after` times more."""
        if self.stop_after == 0:
            self.stop_after = -1
            raise api.InterruptProcessingException
        self.stop_after = max(self.stop_after - 1, -1)

    def add_model_folder_path(self, name: str, path: str, is_default: bool = False) -> None:
        homes = self._homes.setdefault(name, [])
        if path not in homes:
            homes.append(path)

    @contextmanager
    def installed(self) -> Iterator[Comfy]:
        """With its modules in place of ComfyUI's, for as long as this lasts."""
        latest = SimpleNamespace(
            io=io, ComfyExtension=api.ComfyExtension, Types=SimpleNamespace(VideoComponents=api.VideoComponents),
            InputImpl=SimpleNamespace(VideoFromComponents=api.VideoFromComponents, VideoFromFile=api.VideoFromFile),
        )  # fmt: skip
        modules: dict[str, Any] = {
            "comfy": ModuleType("comfy"), "comfy_api": ModuleType("comfy_api"), "comfy_api.latest": latest,
            "comfy.utils": SimpleNamespace(ProgressBar=api.ProgressBar), "comfy.model_management": self,
            "folder_paths": SimpleNamespace(
                models_dir=str(self.folder / "models"), add_model_folder_path=self.add_model_folder_path,
                get_folder_paths=lambda name: [*self._homes[name]], get_temp_directory=lambda: str(self.folder / "temp"),
            ),
        }  # fmt: skip
        assert not modules.keys() & sys.modules.keys()
        sys.modules.update(modules)
        try:
            yield self
        finally:
            for name in [name for name in sys.modules if name in modules or name.startswith(_NAME)]:
                del sys.modules[name]
