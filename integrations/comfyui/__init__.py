"""MotionRT's nodes for ComfyUI. ComfyUI imports this folder from its `custom_nodes` and asks `comfy_entrypoint` for them."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
