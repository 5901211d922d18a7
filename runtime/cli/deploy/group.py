"""`motionrt deploy`: what other engines need to run a bundle, written for them."""

from __future__ import annotations

import typer

from motionrt.runtime.cli.deploy.ray import ray
from motionrt.runtime.cli.deploy.triton import triton

deploy_app = typer.Typer(help="Write what other engines need to run a bundle.", no_args_is_help=True, rich_markup_mode=None)
deploy_app.command()(ray)
deploy_app.command()(triton)
