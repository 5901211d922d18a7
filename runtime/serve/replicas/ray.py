"""Replicas in Ray Serve: `build` is what a config of `motionrt deploy ray` names, `run` starts one on this machine alone.

Only Ray imports this module, and `motionrt deploy ray --run`: it needs the extra `ray`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve

from motionrt.runtime.serve.replicas.replica import Replica

_LONGEST = 3600.0  # seconds that a job may still take once its replica is to go


class Multiplexed(Replica):
    """A replica that Ray hands jobs of the bundle that it has open, where it can."""

    opened = serve.multiplexed(max_num_models_per_replica=1)(Replica.opened)


def build(openings: Mapping[str, Mapping[str, Any]]) -> Any:
    """The application of `openings` (see `Replica`)."""
    options = {"name": "replicas", "max_ongoing_requests": 1, "graceful_shutdown_timeout_s": _LONGEST}
    return serve.deployment(user_config={}, **options)(Multiplexed).bind(openings)


def run(config: Path) -> None:
    """Start Ray on this machine with `config`, without its dashboard, and go on until a signal; nothing is reported to anyone
    unless RAY_USAGE_STATS_ENABLED says so."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.serve.scripts import cli

    ray.init("local", include_dashboard=False, namespace="serve")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: Ray's own prints a stack
    cli(["run", str(config)])
