"""Running an aiohttp application as a process: binding, readiness, and a stop that loses nothing.

Promise: a taken address is one clear line before anything else starts; on SIGTERM or SIGINT readiness goes
first, listening goes next, requests under way finish (bodies still being uploaded included) and only then is
the application cleaned up; the same signal again, or the drain's deadline, cuts what is left. Left to others: what
the routes do, and ending long streams: they watch `Lifecycle.draining`.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Any, Final, Protocol

import orjson
from aiohttp import web
from aiohttp.log import server_logger
from aiohttp.typedefs import Handler

KEEPALIVE_S: Final = 75.0
"""Longer than the idle time of our own clients, so that they, not the server, close an idle connection."""
_FOR_EVER_S: Final = 1e8
GRACE_S: Final = 0.2
"""How long a draining server still takes connections, so that balancers see /readyz turn before they are
refused.
"""
SETTLE_TURNS: Final = 10
SETTLE_TURN_S: Final = 0.01
"""What a connection made just before listening ended has to send its request: turns of the event loop, because
a busy one may need longer for them than any time set here."""
CUT_S: Final = 0.1
"""What a cancelled handler gets to tidy up in."""
CHECK_TIMEOUT_S: Final = 2.0
HEADER_LINE_BYTES_MAX: Final = 16 * 1024
HEADER_FIELDS_MAX: Final = 128
BACKLOG: Final = 4096
GARBAGE_OBJECTS: Final = 10_000
"""New objects after which cycles are looked for; the interpreter's own 700 are made by a few requests."""

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
OK: Final = "ok"

log = logging.getLogger(__name__)


class AddressError(OSError):
    """An address cannot be listened on; the text is one line for the operator."""


class Lifecycle:
    """Whether this process should be sent requests.

    Ready is: not draining, and every check answered ok when last run. Checks run when `/readyz` is asked or
    `check()` is awaited, all at once; one that raises, returns a reason, or takes over `CHECK_TIMEOUT_S`
    fails.
    """

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        """Set once, when the process begins to stop: long streams end when they see it."""
        self.in_flight = 0
        """Requests whose handler is running."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._checks: dict[str, Callable[[], Awaitable[str | None]]] = {}
        self._statuses: dict[str, str] = {}

    def add_check(self, name: str, check: Callable[[], Awaitable[str | None]]) -> None:
        """Readiness also needs `check` to return None; a string is the reason why not, and so is an
        exception.
        """
        self._checks[name] = check
        self._statuses[name] = "not checked yet"

    @property
    def ready(self) -> bool:
        return not self.draining.is_set() and all(status == OK for status in self._statuses.values())

    @property
    def statuses(self) -> dict[str, str]:
        """Each check's last result: "ok" or the reason."""
        return dict(self._statuses)

    async def check(self) -> bool:
        """Run the checks now; True when ready."""
        if self._checks:
            names = list(self._checks)
            results = await asyncio.gather(*(self._run_check(self._checks[name]) for name in names))
            self._statuses.update(zip(names, results, strict=True))
        return self.ready

    def drain(self) -> None:
        """Begin to stop: not ready from now on. Idempotent."""
        self.draining.set()

    async def wait_idle(self) -> None:
        """Return when no request is being handled."""
        await self._idle.wait()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Counts the requests under way; `serve` installs it in an application."""
        self.begin()
        try:
            return await handler(request)
        finally:
            self.end()

    def begin(self) -> None:
        """A request is being handled; `end` is to follow."""
        self.in_flight += 1
        if self.in_flight == 1:
            self._idle.clear()

    def end(self) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    async def _run_check(self, check: Callable[[], Awaitable[str | None]]) -> str:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                reason = await check()
        except TimeoutError:
            return f"no answer within {CHECK_TIMEOUT_S:g} s"
        except Exception as exc:
            return str(exc) or type(exc).__name__
        return OK if reason is None else reason

    def __repr__(self) -> str:
        state = "draining" if self.draining.is_set() else "ready" if self.ready else "not ready"
        return f"<Lifecycle {state}, {self.in_flight} in flight, checks {self._statuses}>"


class Front(Protocol):
    """Stands between clients' connections and aiohttp: it keeps the time of idle connections, and closes them."""

    def over(self, server: web.Server) -> Callable[[], asyncio.Protocol]:
        """The protocol factory to listen with."""
        ...

    def drain(self) -> None:
        """Close what is idle, and the rest when its answer is written. Idempotent."""
        ...

    async def flushed(self) -> None:
        """Return when every answer is in the kernel's hands."""
        ...

    def close(self) -> None:
        """Cut every connection."""
        ...


class Service(Protocol):
    """What answers requests without an application around it, which costs more than most answers."""

    def running(self) -> AbstractAsyncContextManager[None]:
        """Its background work."""
        ...

    def server(self, **options: Any) -> web.Server:
        """aiohttp's low-level server of its handler. The handler counts with `Lifecycle.begin` and `end`, and says that
        a connection ends with its answer while the process drains."""
        ...


def add_health_routes(app: web.Application, lifecycle: Lifecycle) -> None:
    """The routes of `health_handlers`."""
    for path, handler in health_handlers(lifecycle).items():
        app.router.add_get(path, handler)


def health_handlers(
    lifecycle: Lifecycle,
) -> Mapping[str, Callable[[web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]]]:
    """`GET /healthz`: 200 while the process lives. `GET /readyz`: 200 or 503
    `{"ready":bool,"checks":{name:"ok"|reason}}`.
    """

    async def healthz(request: web.BaseRequest) -> web.Response:
        return web.json_response({"status": "alive"}, headers={"Cache-Control": "no-store"})

    async def readyz(request: web.BaseRequest) -> web.Response:
        ready = await lifecycle.check()
        checks = lifecycle.statuses
        if lifecycle.draining.is_set():
            checks["lifecycle"] = "draining"
        return web.Response(
            status=200 if ready else 503,
            body=orjson.dumps({"ready": ready, "checks": checks}),
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )

    return {"/healthz": healthz, "/readyz": readyz}


async def serve(
    app: web.Application | Service,
    host: str,
    port: int,
    *,
    lifecycle: Lifecycle,
    drain_seconds: float = 10.0,
    grace_seconds: float = GRACE_S,
    reuse_port: bool = False,
    auto_decompress: bool = True,
    front: Front | None = None,
    on_ready: Callable[[str, int], None] | None = None,
) -> int:
    """Serve `app` until SIGTERM or SIGINT, then drain; the exit status (0).

    `on_ready(host, port)` is called once connections are taken, with the real port when 0 was asked for. A
    proxy passes `auto_decompress=False` to see request bodies as they were sent. `front` takes the connections, if
    there is one. Raises AddressError before the application starts.
    """
    sockets = await _bind(host, port, reuse_port=reuse_port)
    stop = asyncio.Event()
    hurry = asyncio.Event()

    seen: set[signal.Signals] = set()

    def on_signal(which: signal.Signals) -> None:
        # Only the same signal again is impatience: a Ctrl-C reaches a child from the terminal as SIGINT, and then
        # as the SIGTERM of the parent that it also reached.
        (hurry if which in seen else stop).set()
        seen.add(which)

    loop = asyncio.get_running_loop()
    for which in STOP_SIGNALS:
        loop.add_signal_handler(which, on_signal, which)

    async def when_draining(request: web.Request, response: web.StreamResponse) -> None:
        close_when_draining(lifecycle, response)

    server_logger.addFilter(_not_a_broken_body)
    options: dict[str, Any] = {
        "access_log": None,
        "keepalive_timeout": KEEPALIVE_S if front is None else _FOR_EVER_S,
        "max_line_size": HEADER_LINE_BYTES_MAX,
        "max_field_size": HEADER_LINE_BYTES_MAX,
        "max_headers": HEADER_FIELDS_MAX,
        "auto_decompress": auto_decompress,
    }
    if isinstance(app, web.Application):
        app.middlewares.insert(0, lifecycle.middleware)
        app.on_response_prepare.append(when_draining)
        runner = web.AppRunner(app, shutdown_timeout=CUT_S, **options)
    else:
        runner = web.ServerRunner(app.server(**options), shutdown_timeout=CUT_S)
    servers: list[asyncio.Server] = []
    background = AsyncExitStack()
    try:
        if not isinstance(app, web.Application):
            await background.enter_async_context(app.running())
        await runner.setup()
        assert runner.server is not None
        factory = runner.server if front is None else front.over(runner.server)
        for sock in sockets:
            try:
                servers.append(await loop.create_server(factory, sock=sock, backlog=BACKLOG))
            except OSError as exc:
                raise _address_error(host, port, exc) from exc
        # What is here now stays; and nearly all that a request makes is in no cycle, and gone before it could be found.
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS)
        if on_ready is not None:
            on_ready(host, sockets[0].getsockname()[1])
        await stop.wait()

        lifecycle.drain()
        log.info("draining", extra={"fields": {"in_flight": lifecycle.in_flight}})
        await _first(hurry.wait(), asyncio.sleep(grace_seconds))
        late = [connection for sock in sockets for connection in _waiting(sock)]
        for server in servers:
            server.close()
        for connection in late:
            await loop.connect_accepted_socket(factory, connection)
        if front is not None:
            front.drain()
        # aiohttp's own shutdown stops reading from every connection at once, which would starve an upload
        # under way: it is called only when nothing is left, or when time is up.
        deadline = loop.time() + drain_seconds
        await _first(hurry.wait(), asyncio.sleep(drain_seconds), _quiet(lifecycle))
        if lifecycle.in_flight:
            log.warning("requests cut by the drain's end", extra={"fields": {"in_flight": lifecycle.in_flight}})
        # The handlers are done, their answers may still be on the way to slow readers.
        runner.server.pre_shutdown()
        await _first(hurry.wait(), runner.server.shutdown(max(CUT_S, deadline - loop.time())))
        if front is not None:
            await _first(hurry.wait(), asyncio.sleep(max(CUT_S, deadline - loop.time())), front.flushed())
        return 0
    finally:
        if front is not None:
            front.close()
        for server in servers:
            server.close()
        for sock in sockets:
            sock.close()
        await runner.cleanup()
        await background.aclose()
        for which in STOP_SIGNALS:
            loop.remove_signal_handler(which)


def close_when_draining(lifecycle: Lifecycle, response: web.StreamResponse) -> None:
    """For a response about to be sent: a kept-alive connection closed under a client's next request is a lost
    request; a client told so is not."""
    if lifecycle.draining.is_set():
        response.force_close()
        response.headers["Connection"] = "close"


@web.middleware
async def cut_quietly(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A connection that is lost or was cut is no fault of the server's: aiohttp would log it as one, with a traceback,
    while a handler that was cancelled just has its connection closed."""
    try:
        return await handler(request)
    except ConnectionResetError:
        raise asyncio.CancelledError from None


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run a process' main coroutine, on uvloop where there is one, with all the open files it may have; its exit
    status."""
    _raise_file_limit()
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _raise_file_limit() -> None:
    """Connections are files, and most systems start a process with leave for 1,024 and the right to far more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems name a right that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _not_a_broken_body(record: logging.LogRecord) -> bool:
    """aiohttp reads to the end of a body behind our answer, and logs as a fault of ours that it was malformed."""
    return not (record.exc_info and isinstance(record.exc_info[1], web.RequestPayloadError))


async def _quiet(lifecycle: Lifecycle) -> None:
    """Return when the last connections' requests have been read and every request has been handled."""
    for _ in range(SETTLE_TURNS):
        await asyncio.sleep(SETTLE_TURN_S)
    await lifecycle.wait_idle()


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when any of `waits` is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _bind(host: str, port: int, *, reuse_port: bool) -> list[socket.socket]:
    """Sockets bound, not yet listening: a taken address is known before the application opens its files."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise _address_error(host, port, exc) from exc
    sockets: list[socket.socket] = []
    refusal: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        # A name with an IPv4 and an IPv6 address gets one port for both.
        chosen = port or (sockets[0].getsockname()[1] if sockets else 0)
        try:
            sockets.append(_bound((address[0], chosen, *address[2:]), family, kind, protocol, reuse_port))
        except OSError as exc:
            refusal = exc
            if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break  # only a family that this machine lacks may be missing
    else:
        if sockets:
            return sockets
    for sock in sockets:
        sock.close()
    raise _address_error(host, port, refusal or OSError(errno.EADDRNOTAVAIL, "no address")) from refusal


def _waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that the kernel has taken for us and would reset when listening ends."""
    with suppress(BlockingIOError):
        while True:
            yield listener.accept()[0]


def _bound(address: tuple[object, ...], family: int, kind: int, protocol: int, reuse_port: bool) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _address_error(host: str, port: int, exc: OSError) -> AddressError:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    reasons = {
        errno.EADDRINUSE: "is already in use",
        errno.EACCES: "needs more rights than this user has",
        errno.EADDRNOTAVAIL: "is not an address of this machine",
    }
    reason = reasons.get(exc.errno or 0)
    return AddressError(f"address {address} {reason}" if reason else f"address {address}: {exc.strerror or exc}")
