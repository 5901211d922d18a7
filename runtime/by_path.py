"""Files of the repository that are no part of the package, as modules: the demo's, the benchmarks', the helpers of tests.

The repository is never on sys.path. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from motionrt.runtime.errors import InputError


def load_by_path(path: Path) -> ModuleType:
    """The module in the file `path`, loaded anew at every call; InputError where there is none."""
    name = f"motionrt_by_path_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{path} is missing. Check out the repository again.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
