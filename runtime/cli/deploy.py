"""`motionrt deploy`: a bundle for servers that others run."""

from __future__ import annotations

import typer

from motionrt.runtime.cli.service.triton import triton

deploy_app = typer.Typer(
    help="Write what other servers need to serve a bundle.", no_args_is_help=True, rich_markup_mode=None
)
deploy_app.command()(triton)


@deploy_app.callback()
def _group() -> None:
    """A group also while it has one command."""
