"""What TensorRT-RTX compiled for one engine on one GPU, kept beside the engine for the next process.

TensorRT-RTX finishes an engine on the machine that runs it, which takes seconds; its runtime cache holds the result. One file
for each GPU, driver and engine: `<graph>-<gpu>-<driver>-<engine digest>.rtxcache`. A cache is never needed: one that is
missing, refused by TensorRT or not writable only costs the time to compile again.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from motionrt.runtime.backends.tensorrt.device_memory import Cuda
from motionrt.runtime.backends.tensorrt.engine_file import EngineFile
from motionrt.runtime.errors import BackendError
from motionrt.runtime.files import replacing

log = logging.getLogger("motionrt")


class RuntimeCache:
    """The runtime cache of one engine, in the file `path`; every context of it shares the one `IRuntimeCache`."""

    def __init__(self, file: EngineFile, cuda: Cuda) -> None:
        place = re.sub(r"[^A-Za-z0-9.]+", "_", f"{cuda.name}-{cuda.driver}")
        self.path = file.folder / f"{file.graph}-{place}-{file.engine_sha256[:12]}.rtxcache"
        self._cache: Any = None
        self._known = b""

    def attach(self, config: Any) -> None:
        """Give `config`, an `IRuntimeConfig`, the cache; read from its file the first time."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            try:
                self._known = self.path.read_bytes()
            except OSError:
                self._known = b""
            if self._known and not self._cache.deserialize(self._known):
                log.info("TensorRT-RTX refuses the runtime cache %s: compiling again", self.path)
                self._known = b""
        if not config.set_runtime_cache(self._cache):
            log.info("TensorRT-RTX takes no runtime cache: compiling at every start")

    def save(self) -> None:
        """Write the cache if it has changed; a folder that cannot be written is no error."""
        content = bytes(memoryview(self._cache.serialize())) if self._cache is not None else b""
        if not content or content == self._known:
            return
        try:
            with replacing(self.path, BackendError) as temporary:
                temporary.write_bytes(content)
            self._known = content
        except (BackendError, OSError) as error:
            log.info("the runtime cache %s was not kept: %s", self.path, error)
