"""What a server is told, in one place. The command line and `motionrt.serve.app(...)` both make this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrt.runtime.errors import InputError


@dataclass(frozen=True)
class Settings:
    """bundles, memories: directories by name; the first memory that was made for a bundle is what it searches by default.

    store: where jobs and videos are kept. run_options: fields of `RunOptions` of the workers; devices: a worker for each, or
    `workers` of them on one (0: a thread of the server). keys: file of API keys; None: whoever reaches the server may do all.
    lifetime: seconds that a finished job is kept; queue: jobs that may wait; storage: bytes of finished videos, beyond which
    the oldest go; drain: seconds that running jobs have to end when the server is told to stop. body: bytes of a request.
    hosts: names that a request may address the server by, any if none is given; origins: of other pages that may use it.
    clips: bytes of a request that brings a clip for a memory; decoding: bytes of memory that reading it may take.
    proxies: addresses and networks (10.0.0.0/8) whose connections are those of many clients, and are not counted.
    examples: pictures by prompt, which the page offers to begin with. preview: seconds between two previews of a job that runs,
    of bundles that have them; 0: none. replicas: URL of replicas in Ray Serve, to which each of `workers` sends a job at a
    time; "": workers make the videos themselves.
    """

    bundles: Mapping[str, Path]
    store: Path
    memories: Mapping[str, Path] = field(default_factory=dict)
    run_options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    workers: int = 1
    replicas: str = ""
    low_memory: bool = False
    batch: int = 1
    batch_rounding: bool = False
    self_test: bool = True
    preview: float = 0.5
    keys: Path | None = None
    lifetime: float = 86400.0
    queue: int = 100
    storage: int = 10 << 30
    drain: float = 30.0
    body: int = 32 << 20
    clips: int = 512 << 20
    decoding: int = 4 << 30
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    page: bool = True
    examples: Mapping[str, Path] = field(default_factory=dict)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.bundles:
            raise InputError("no bundle is given; name one: --bundle NAME=DIRECTORY.")
        bounds = {
            "workers": (0, 64),
            "batch": (1, 64),
            "queue": (1, 100_000),
            "lifetime": (1, None),
            "storage": (1 << 20, None),
            "preview": (0, 3600),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not value >= low or high is not None and value > high:
                raise InputError(f"{name} is {value!r}; allowed is {low}{' or more' if high is None else f' to {high}'}.")
        for name in (*self.bundles, *self.memories):
            if not name or len(name) > 64 or not all(char.isalnum() or char in "._-" for char in name):
                raise InputError(f"the name {name!r} is not one; allowed are up to 64 letters, digits and . _ -")
        if self.devices and self.workers not in (1, len(self.devices)):
            raise InputError(f"{self.workers} workers for {len(self.devices)} devices; each device has one.")
        if self.replicas and not self.replicas.startswith(("http://", "https://")):
            raise InputError(f"replicas is {self.replicas!r}; it must be a URL, such as http://127.0.0.1:8000.")
        if self.replicas and (self.devices or self.batch > 1 or not self.workers):
            raise InputError(
                "replicas have devices and batches of their own; leave these out. workers is how many jobs are sent at once: 1"
                " or more."
            )
