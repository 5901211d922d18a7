"""Connections that say nothing, and too many of one address: bounds that no ASGI application can set, in uvicorn's protocol."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections import Counter
from collections.abc import Collection
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from motionrt.runtime.errors import InputError
from motionrt.runtime.serve.web.refusal import Refused

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def guarded_protocol(*, seconds: float = 15, connections: int = 128, proxies: Collection[str] = ()) -> type[asyncio.Protocol]:
    """For `uvicorn.Config(http=…)`. seconds: a connection on which the headers of a request have not arrived by then is closed.
    connections: of one address; one more is refused (429). Those of this machine and of `proxies` are not counted: behind a
    proxy may be everybody. Raises InputError for a proxy that is no address and no network."""
    known = []
    for proxy in proxies:
        try:
            known.append(ipaddress.ip_network(proxy))
        except ValueError:
            raise InputError(f"the proxy {proxy!r} is no address; allowed are such as 192.0.2.7 and 10.0.0.0/8.") from None
    bounds = {"head_seconds": seconds, "most": connections, "proxies": known, "here": Counter()}
    return type("GuardedProtocol", (_Guard, AutoHTTPProtocol), bounds)


class _Guard(asyncio.Protocol):
    """See `guarded_protocol`. uvicorn's own attributes (`connections`, `transport`, ...) must not be named again here."""

    head_seconds: float
    most: int
    proxies: list[Network]
    here: Counter[str]  # connections by address
    cycle: Any = None  # uvicorn's: the request that is answered, or was the last

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._timer: asyncio.TimerHandle | None = None
        self._refused = self.here[self._address] >= self.most and not self._uncounted()
        self._transport = transport
        self.here[self._address] += 1
        if not self._refused:
            self._arm()
            return super().connection_made(transport)
        transport = cast("asyncio.Transport", transport)
        text = f"{self.most} connections of this address are open, which is all that may be. Close some."
        body = json.dumps(Refused(429, "too_many_connections", text, kind="rate_limit_error").json()).encode()
        head = f"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        transport.write(f"{head}retry-after: 1\r\nconnection: close\r\n\r\n".encode() + body)
        transport.close()

    def _uncounted(self) -> bool:
        if not self._address:
            return True  # a socket of this machine's file system
        address = ipaddress.ip_address(self._address.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or address  # ::ffff:192.0.2.7 of a socket for both
        return bool(mapped.is_loopback) or any(mapped in proxy for proxy in self.proxies)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()
        elif self._timer is None:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.here[self._address] -= 1
        if not self.here[self._address]:
            del self.here[self._address]
        if not self._refused:
            super().connection_lost(exc)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.head_seconds, self._transport.close)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
