"""A client of the public thread API, for the command line and for programs beside it.

Promise: every request is tried again while that can help (no connection, 429, 502, 503, 504), within bounds of
attempts and time, as long as the server asks, and always with the same ids, so that a retry adds nothing
twice; whole threads are read page by page; what a server sent is handed on as the bytes it sent. Left to
others: which ids to use (`origin.importers`), and what is done with many threads at once
(`origin.transfer`).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Final, Literal, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from infra.clock import SYSTEM_CLOCK, Clock
from infra.retry import RetryEvent, retrying
from infra.trace import HEADER as TRACEPARENT
from infra.trace import Trace
from origin.thread import Version, Visibility

ATTEMPTS: Final = 40
SECONDS_MAX: Final = 60.0
"""How long one call goes on trying."""
WAIT_MAX_S: Final = 3.0
CONNECT_SECONDS: Final = 5.0
ATTEMPT_SECONDS: Final = 60.0
CONNECTIONS: Final = 32
PAGE_MESSAGES: Final = 1_000
LIST_PAGE: Final = 200
RESETS_MAX: Final = 5
"""How often reading a whole thread starts over because its entries moved."""
EVENT_LINE_BYTES_MAX: Final = 32 * 1024 * 1024
EVENT_SILENCE_S: Final = 45.0
"""Three of the server's comment lines missed: the connection is taken for dead."""

RETRIED_STATUSES: Final = frozenset({429, 502, 503, 504})

T = TypeVar("T")
RawObject = dict[str, msgspec.Raw]


class ApiError(Exception):
    """The server said no. The text is for people; it ends with the trace id to quote."""

    def __init__(
        self, status: int, kind: str, detail: str, *, trace_id: str = "", retry_after: float = 0.0,
        message_id: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"{detail} ({status} {kind}{f', trace {trace_id}' if trace_id else ''})")
        self.status = status
        self.kind = kind
        """Last part of the problem's type URL, such as "thread-not-found"."""
        self.detail = detail
        self.trace_id = trace_id
        self.retry_after = retry_after
        self.message_id = message_id
        """The message an entry conflict is about."""


class EdgeUnreachable(Exception):
    """No answer from the edge; what was sent may have been carried out."""


class ThreadSummary(msgspec.Struct, frozen=True):
    """The fields of a listed thread that the server always gives."""

    id: str
    v: int
    epoch: int
    title: str
    visibility: str
    owner: str
    team: str | None
    origin_region: str
    created_at: str
    last_activity: str
    message_count: int
    archived: bool

    @property
    def version(self) -> Version:
        return Version(self.epoch, self.v)


class ThreadList(msgspec.Struct, frozen=True):
    """A page of summaries, as sent."""

    threads: list[msgspec.Raw]
    next_cursor: str | None = None
    has_more: bool = False


class ThreadPage(msgspec.Struct, frozen=True):
    """A thread's fields and some of its messages, each value as the server sent it."""

    fields: RawObject
    messages: list[msgspec.Raw]
    next_after: str | None = None

    @property
    def summary(self) -> ThreadSummary:
        return msgspec.json.decode(msgspec.json.encode(self.fields), type=ThreadSummary)


class Stored(msgspec.Struct, frozen=True):
    """The answer to a write: the version of the last entry it stands for."""

    version: Version
    created: bool = False
    pending: tuple[str, ...] = ()
    """Regions that had not yet applied a deletion or a narrowed visibility."""
    seqs: tuple[int, ...] = ()
    """Of an append: the place of each message, new or there before."""
    attempts: int = 1


class Event(msgspec.Struct, frozen=True):
    """One event of a feed. `data` is JSON."""

    name: str
    data: bytes
    id: str = ""


class Claims(msgspec.Struct, frozen=True):
    """Who the token says we are."""

    iss: str
    sub: str
    team: str | None = None


class _Problem(msgspec.Struct, frozen=True):
    type: str = ""
    title: str = ""
    detail: str = ""
    trace_id: str = ""
    message_id: str | None = None


class _Messages(msgspec.Struct, frozen=True):
    messages: list[msgspec.Raw] = []
    next_after: str | None = None


class _Placed(msgspec.Struct, frozen=True):
    seq: int


class _Appended(msgspec.Struct, frozen=True):
    messages: tuple[_Placed, ...] = ()


class _Answer(msgspec.Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    body: bytes
    attempt: int


class ThreadClient:
    """Speaks to one edge as one user. An async context manager; its calls may run at the same time."""

    def __init__(
        self,
        edge: str,
        token: str,
        *,
        clock: Clock = SYSTEM_CLOCK,
        rng: random.Random | None = None,
        attempts: int = ATTEMPTS,
        seconds_max: float = SECONDS_MAX,
        on_retry: Callable[[RetryEvent], None] | None = None,
    ) -> None:
        self.edge = edge.rstrip("/")
        self._token = token
        self._clock = clock
        self._rng = rng if rng is not None else random.Random()
        self._attempts = attempts
        self._seconds_max = seconds_max
        self._on_retry = on_retry
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ThreadClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS),
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=aiohttp.ClientTimeout(total=ATTEMPT_SECONDS, sock_connect=CONNECT_SECONDS),
            read_bufsize=1 << 20,
            middlewares=(_tell_of_lost_connections,),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    # ---------------------------------------------------------------- reading

    async def verify(self) -> Claims:
        """Who this client is to the edge; ApiError 401 when the token is not believed."""
        answer = await self._call("GET", "/api/auth/verify")
        return _decode(answer.body, Claims)

    async def list(
        self,
        *,
        scope: Literal["mine", "team"] = "mine",
        archived: bool | None = None,
        query: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> ThreadList:
        """A page of summaries, newest activity first; with `query` those that match it. `archived` None: any."""
        wanted = "any" if archived is None else "true" if archived else "false"
        parameters = {"limit": str(limit), "scope": scope, "archived": wanted}
        if query is not None:
            parameters["q"] = query
        if cursor is not None:
            parameters["cursor"] = cursor
        path = "/api/threads" if query is None else "/api/threads/search"
        return _decode((await self._call("GET", path, parameters=parameters)).body, ThreadList)

    async def each(
        self,
        *,
        scope: Literal["mine", "team"] = "mine",
        archived: bool | None = None,
        query: str | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[msgspec.Raw]:
        """Summaries across pages, at most `limit` of them."""
        cursor: str | None = None
        given = 0
        while limit is None or given < limit:
            size = LIST_PAGE if limit is None else min(LIST_PAGE, limit - given)
            page = await self.list(scope=scope, archived=archived, query=query, limit=size, cursor=cursor)
            for summary in page.threads:
                yield summary
            given += len(page.threads)
            cursor = page.next_cursor
            if cursor is None:
                return

    async def page(self, thread_id: str, *, after: str | None = None, limit: int = PAGE_MESSAGES) -> ThreadPage:
        """A thread with up to `limit` of its messages behind the cursor `after`."""
        parameters = {"limit": str(limit)}
        if after is not None:
            parameters["after"] = after
        answer = await self._call("GET", _path(thread_id), parameters=parameters)
        fields = _decode(answer.body, RawObject)
        listed = _decode(answer.body, _Messages)
        return ThreadPage(
            {name: value for name, value in fields.items() if name not in _Messages.__struct_fields__},
            listed.messages,
            listed.next_after,
        )

    async def find(self, thread_id: str) -> ThreadSummary | None:
        """The thread's summary; None when there is none, or none we may know of."""
        try:
            return (await self.page(thread_id, limit=1)).summary
        except ApiError as error:
            if error.status in (404, 410):
                return None
            raise

    async def whole(self, thread_id: str) -> ThreadPage:
        """The thread with all its messages."""
        for remaining in reversed(range(RESETS_MAX)):
            try:
                first = page = await self.page(thread_id)
                messages = list(first.messages)
                while page.next_after is not None:
                    page = await self.page(thread_id, after=page.next_after)
                    messages += page.messages
                return ThreadPage(page.fields, messages)
            except ApiError as error:
                # The entries behind our cursor moved (PROTOCOL section 6): what was read may not be the log.
                if error.kind != "reset" or not remaining:
                    raise
        raise AssertionError("unreachable")

    async def events(self, thread_id: str | None = None, *, last_event_id: str | None = None) -> AsyncIterator[Event]:
        """Events of one thread, or of all that this user may see, for ever.

        A lost connection is resumed behind the last event; one that can't be had again raises as a read does.
        """
        path = "/api/threads/events" if thread_id is None else f"{_path(thread_id)}/events"
        last = last_event_id
        while True:
            # The server's word that it is there at all, retried; the stream itself is opened once for it.
            response = await self._retrying(lambda _, last=last: self._open_events(path, last))
            try:
                async for event in _parse_events(response.content):
                    last = event.id or last
                    yield event
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass
            finally:
                response.close()
            await self._clock.sleep(self._rng.uniform(0.05, 0.2))

    # ---------------------------------------------------------------- writing

    async def put(self, thread_id: str, body: bytes) -> Stored:
        """Create the thread, or add to it what is new of the document `body`."""
        return _stored(await self._call("PUT", _path(thread_id), body=body, minimal=True))

    async def append(self, thread_id: str, body: bytes) -> Stored:
        """Append `{"messages":[…]}`. The messages' own ids make it safe to try again."""
        answer = await self._call("POST", f"{_path(thread_id)}/messages", body=body, minimal=True)
        seqs = tuple(placed.seq for placed in _decode(answer.body, _Appended).messages)
        return msgspec.structs.replace(_stored(answer), seqs=seqs)

    async def patch(
        self,
        thread_id: str,
        *,
        title: str | None = None,
        visibility: Visibility | None = None,
        archived: bool | None = None,
    ) -> Stored:
        """Set the fields that are given."""
        fields = {"title": title, "visibility": visibility, "archived": archived}
        body = msgspec.json.encode({name: value for name, value in fields.items() if value is not None})
        key = str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
        return _stored(await self._call("PATCH", _path(thread_id), body=body, key=key, minimal=True))

    async def delete(self, thread_id: str) -> Stored:
        """Delete the thread; ApiError 404 when there was none."""
        try:
            return _stored(await self._call("DELETE", _path(thread_id)))
        except _GoneAfterRetry:
            return Stored(Version(0, 0))

    # ---------------------------------------------------------------- one request

    async def _call(
        self,
        method: str,
        path: str,
        *,
        parameters: Mapping[str, str] | None = None,
        body: bytes | None = None,
        key: str | None = None,
        minimal: bool = False,
    ) -> _Answer:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if minimal:
            headers["Prefer"] = "return=minimal"
        if key is not None:
            headers["Idempotency-Key"] = key
        trace = Trace.new(self._rng)

        async def attempt(number: int) -> _Answer:
            session = self._opened()
            sent = {**headers, TRACEPARENT: str(trace.child(self._rng))}
            try:
                async with session.request(
                    method, self.edge + path, params=parameters, data=body, headers=sent, allow_redirects=False
                ) as response:
                    data = await response.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise _unreachable(self.edge, error) from error
            if response.status < 300:
                return _Answer(response.status, response.headers, data, number)
            error = _api_error(response.status, response.headers, data)
            if method == "DELETE" and number > 1 and response.status in (404, 410):
                raise _GoneAfterRetry  # an earlier attempt whose answer was lost
            raise error

        return await self._retrying(attempt)

    async def _retrying(self, attempt: Callable[[int], Awaitable[T]]) -> T:
        number = 0

        async def once() -> T:
            nonlocal number
            number += 1
            return await attempt(number)

        return await retrying(
            once,
            on=_may_help_again,
            attempts=self._attempts,
            seconds_max=self._seconds_max,
            rng=self._rng,
            clock=self._clock,
            wait_initial=0.1,
            wait_max=WAIT_MAX_S,
            on_retry=self._on_retry,
        )

    async def _open_events(self, path: str, last: str | None) -> aiohttp.ClientResponse:
        headers = {"Accept": "text/event-stream"}
        if last is not None:
            headers["Last-Event-ID"] = last
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=EVENT_SILENCE_S)
        try:
            response = await self._opened().get(self.edge + path, headers=headers, timeout=timeout)
            if response.status == 200:
                return response
            async with response:
                raise _api_error(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(self.edge, error) from error

    def _opened(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use it as a context manager"
        return self._session


class _GoneAfterRetry(Exception):
    """A deletion found nothing, after an attempt that may have deleted it."""


async def _tell_of_lost_connections(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """aiohttp sends a PUT or DELETE again by itself when its connection is lost, and does not say so: a
    deletion would then find nothing, and a creation somebody else's thread, though both were ours."""
    try:
        return await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _unreachable(str(request.url.origin()), error) from error


def _may_help_again(error: Exception) -> bool:
    return isinstance(error, EdgeUnreachable) or (isinstance(error, ApiError) and error.status in RETRIED_STATUSES)


def _path(thread_id: str) -> str:
    return f"/api/threads/{quote(thread_id, safe='')}"


def _unreachable(edge: str, error: Exception) -> EdgeUnreachable:
    reason = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    return EdgeUnreachable(f"no answer from {edge}: {reason}")


def _api_error(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        problem = _Problem(detail=body[:200].decode("utf-8", "replace").strip() or "no explanation was given")
    kind = problem.type.rpartition("/")[2] or "error"
    wait = headers.get("Retry-After", "")
    return ApiError(
        status,
        kind,
        problem.detail or problem.title or kind,
        trace_id=problem.trace_id,
        retry_after=float(wait) if wait.isascii() and wait.replace(".", "", 1).isdigit() else 0.0,
        message_id=problem.message_id,
    )


def _stored(answer: _Answer) -> Stored:
    text = answer.headers.get("X-Sync-Version", "")
    pending = answer.headers.get("X-Sync-Pending", "")
    try:
        version = Version.parse(text)
    except ValueError:
        version = Version(0, 0)
    regions = tuple(name.strip() for name in pending.split(",") if name.strip())
    return Stored(version, answer.status == 201, regions, attempts=answer.attempt)


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ApiError(502, "bad-answer", f"the answer is not what this client knows: {error}") from error


async def _parse_events(stream: aiohttp.StreamReader) -> AsyncIterator[Event]:
    """Server-sent events (HTML, section 9.2.6), as far as Weft sends them: one field a line."""
    name, event_id, data = "message", "", list[bytes]()
    pending = b""
    async for chunk in stream.iter_any():
        *lines, pending = (pending + chunk).split(b"\n")
        if len(pending) > EVENT_LINE_BYTES_MAX:
            raise ApiError(502, "bad-answer", "an event is longer than this client takes")
        for line in lines:
            line = line.removesuffix(b"\r")
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if not line:
                if data:
                    yield Event(name, b"\n".join(data), event_id)
                name, data = "message", []
            elif field == b"event":
                name = value.decode("utf-8", "replace")
            elif field == b"id":
                event_id = value.decode("utf-8", "replace")
            elif field == b"data":
                data.append(value)
