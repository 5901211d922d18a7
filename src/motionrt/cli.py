"""The `motionrt` command: the commands of the run side and of the build side, which do not know each other."""

from __future__ import annotations

from motionrt.export.cli import build, export
from motionrt.runtime.cli.common import run_app
from motionrt.runtime.cli.main import app

app.command()(export)
app.command()(build)


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`, those of the process if not given; ends the process as `run_app` says."""
    run_app(app, "motionrt", arguments)
