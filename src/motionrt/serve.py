"""The server as an ASGI application of your own process: `motionrt.serve.app(bundle, store, memory)`. Needs the extra `serve`.

    import motionrt.serve

    service = motionrt.serve.app("demo/bundle", "out/server", "demo/memory", workers=1)  # uvicorn module:service

An application that mounts it runs its lifespan too: `async with service.router.lifespan_context(service): ...`
"""

from __future__ import annotations

from motionrt.runtime.serve.app import app

__all__ = ["app"]
