"""`motionrt serve`, from the address that is listened at to the end: uvicorn, told to let jobs end before it does."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.serve.app import Server, app
from motionrt.runtime.serve.logs import to_standard_error
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.tracing import export
from motionrt.runtime.serve.web.connections import guarded_protocol

CONNECTIONS = 900  # of all addresses; of the 1,024 files that a process may usually have open, some are the store's


def run(
    settings: Settings, host: str, port: int, certificate: Path | None, key: Path | None, say: Callable[[str], None]
) -> None:
    """Serve until a signal says otherwise: the first (SIGTERM, SIGINT) lets running jobs end for `settings.drain` seconds and
    puts the others back into the queue, a second one does so at once. Raises `MotionRTError` where nothing can be served."""
    to_standard_error()
    export()
    application = app(settings.bundles, settings.store, settings=settings)
    _ = application.state.server.store  # refused now, if it is
    try:
        sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
    except OSError as error:
        raise MotionRTError(f"cannot listen at {host}:{port}: {error.strerror}. Choose another --port, or --host.") from None
    config = uvicorn.Config(
        application, log_config=None, access_log=False, timeout_keep_alive=30, timeout_graceful_shutdown=5, server_header=False,
        date_header=True, lifespan="on", ssl_certfile=certificate, ssl_keyfile=None if key is None else str(key),
        proxy_headers=False, ws="none", http=guarded_protocol(proxies=settings.proxies), limit_concurrency=CONNECTIONS,
    )  # fmt: skip
    address = f"{'http' if certificate is None else 'https'}://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
    served = _Served(config, application.state.server, address, say)
    served.run(sockets=[sock])
    if served.why is not None:
        raise MotionRTError(served.why)


class _Served(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server, address: str, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self.server, self.address, self.say = server, address, say
        self.why: str | None = None  # it ended by itself
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            self._task = asyncio.create_task(self._opened())

    async def _opened(self) -> None:
        """Say where the page is once a video can be made; end where none ever can."""
        dispatcher, settings = self.server.dispatcher, self.server.settings
        self.say(f"opening {', '.join(settings.bundles)} ...")
        await dispatcher.opened.wait()
        if not dispatcher.models:
            self.why = next(worker.broken for worker in dispatcher.workers if worker.broken)
            self.should_exit = True
            return
        self.say(f"{'page' if settings.page else 'API'}: {self.address}{'/' if settings.page else '/v1/models'}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._loop is None or self._signals > 2:
            os._exit(128 + sig)
        if self._signals == 2:
            self.server.dispatcher.hurry.set()
        else:
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        await self.server.stop()
        self.should_exit = True
