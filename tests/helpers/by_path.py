"""Files of the repository that are no part of a package, as modules: the demo's, the helpers of tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_by_path(path: Path) -> ModuleType:
    """The module in the file `path`, loaded anew at every call."""
    name = f"motionrt_by_path_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None and path.is_file(), path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
