"""Handlers of the thread API: read a request, ask the store, join the answer.

They run alike over one region or many, since all they know is a `ThreadStore`. What a body or header may
hold is checked in `origin.requests` and `origin.conditions`; who may do what, by the store, inside its
transaction. Which path leads to which handler is said once, in `origin.api`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Concatenate, Final, ParamSpec, TypeVar

import msgspec
from aiohttp import web

from infra.clock import Clock, rfc3339
from infra.identity import Principal
from infra.problem import Problem
from infra.trace import current_trace
from origin import conditions, page
from origin.answers import (
    PAGE_MESSAGES_MAX,
    OtherRegion,
    Regions,
    appended_json,
    created_page,
    strong_tag,
    thread_json,
    threads_json,
)
from origin.events import EventStreams
from origin.ids import IdMint
from origin.problems import not_found
from origin.requests import (
    ThreadDraft,
    deletion,
    invalid,
    read_messages,
    read_patch,
    read_thread,
    thread_id_from,
)
from origin.store.base import (
    Draft,
    ListQuery,
    Position,
    StaleVersion,
    StoreError,
    ThreadExists,
    ThreadNotFound,
    ThreadPage,
    ThreadStore,
    Write,
    Written,
)
from origin.thread import Row, Version, Visibility, summary_json

BODY_BYTES_MAX: Final = 16 * 1024 * 1024
PARSE_INLINE_BYTES_MAX: Final = 256 * 1024
THREADS_DEFAULT: Final = 50
THREADS_MAX: Final = 200
QUERY_CHARS_MAX: Final = 1_000
PRIVATE: Final = "private, no-cache"

_ARCHIVED: Final = {"true": True, "false": False, "any": None}
_JSON_TYPE: Final = re.compile(r"application/(?:[\w.+-]+\+)?json", re.IGNORECASE | re.ASCII)


P = ParamSpec("P")
T = TypeVar("T")


class ThreadHandlers:
    """One region's thread API. Every handler takes the request and the verified caller."""

    def __init__(
        self,
        *,
        store: ThreadStore,
        streams: EventStreams,
        mint: IdMint,
        region: str,
        holder_of: Callable[[Row], str],
        others: Callable[[], Awaitable[Sequence[OtherRegion]]],
        incarnation: Callable[[], str],
        clock: Clock,
        openapi: bytes,
        reference: bytes,
        reference_policy: str,
        body_bytes_max: int,
    ) -> None:
        self._store = store
        self._streams = streams
        self._mint = mint
        self._region = region
        self._holder_of = holder_of
        self._others = others
        self._incarnation = incarnation
        self._clock = clock
        self._openapi = openapi
        self._reference = reference
        self._reference_policy = reference_policy
        self._body_bytes_max = body_bytes_max
        self._pages = page.Pages()

    # ------------------------------------------------------------ reading

    async def list_threads(self, request: web.Request, actor: Principal) -> web.Response:
        return await self._listing(request, actor, None)

    async def list_regions(self, request: web.Request, actor: Principal) -> web.Response:
        seen = Regions(self._region, list(await self._others()))
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Served-Region": self._region}
        return web.Response(body=msgspec.json.encode(seen), headers=headers)

    async def search_threads(self, request: web.Request, actor: Principal) -> web.Response:
        text = conditions.parameter(request, "q")
        if text is None or not text.strip():
            raise invalid("q", "says what to search for and is required")
        if len(text) > QUERY_CHARS_MAX:
            raise invalid("q", f"must have at most {QUERY_CHARS_MAX:,} characters")
        return await self._listing(request, actor, text)

    async def get_thread(self, request: web.Request, actor: Principal) -> web.Response:
        thread_id = _thread_id(request)
        after = conditions.cursor(request)
        limit = conditions.limit(request, default=PAGE_MESSAGES_MAX, most=PAGE_MESSAGES_MAX)
        freshness = conditions.freshness(request)
        if "If-None-Match" in request.headers:
            # One message is read to save reading them all, most often for nothing.
            found = await self._store.read(thread_id, actor, after=after, limit=1, freshness=freshness)
            headers = self._thread_headers(found.row)
            if conditions.not_modified(request, headers["ETag"]):
                return web.Response(status=304, headers=headers)
        found = await self._store.read(thread_id, actor, after=after, limit=limit, freshness=freshness)
        return self._json(200, self._thread(found), self._thread_headers(found.row))

    async def thread_page(self, request: web.Request, actor: Principal) -> web.Response:
        """A public thread for anyone; `actor` is nobody and does not count."""
        after = conditions.cursor(request)
        found = await self._store.read(_thread_id(request), None, after=after, limit=page.PAGE_MESSAGES)
        body = await self._pages.html(found, after)
        return _validated(request, body, {**page.HEADERS, "X-Served-Region": self._region})

    async def openapi_document(self, request: web.Request, actor: Principal) -> web.Response:
        return _validated(request, self._openapi, {"Content-Type": "application/json", "Cache-Control": "no-cache"})

    async def reference_page(self, request: web.Request, actor: Principal) -> web.Response:
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": self._reference_policy,
            "Cache-Control": "no-cache",
        }
        return _validated(request, self._reference, headers)

    async def _listing(self, request: web.Request, actor: Principal, text: str | None) -> web.Response:
        archived = conditions.choice("archived", conditions.parameter(request, "archived"), tuple(_ARCHIVED), "false")
        scope = conditions.choice("scope", conditions.parameter(request, "scope"), ("mine", "team"), "mine")
        query = ListQuery(
            actor=actor,
            scope="team" if scope == "team" else "mine",
            archived=_ARCHIVED[archived],
            limit=conditions.limit(request, default=THREADS_DEFAULT, most=THREADS_MAX),
            cursor=conditions.parameter(request, "cursor") or None,
            text=text,
            consistency=conditions.consistency(request),
            min_position=conditions.min_position(request),
        )
        listing = await self._store.list(query)
        headers = {
            "Content-Type": "application/json",
            "Cache-Control": PRIVATE,
            "X-Served-Region": self._region,
            conditions.POSITION_HEADER: self._position(listing.position),
        }
        if listing.next_cursor is not None:
            following = request.rel_url.update_query(cursor=listing.next_cursor)
            headers["Link"] = f'<{following}>; rel="next"'
        return _validated(request, threads_json(listing, self._holder_of), headers)

    # ------------------------------------------------------------ writing

    async def create_thread(self, request: web.Request, actor: Principal) -> web.Response:
        body = await read_body(request, self._body_bytes_max)
        draft = await _parse(body, self._read_thread, actor)
        _check_team(draft.visibility, actor.team)
        write = Write(
            thread_id=draft.id if draft.id is not None else self._mint.thread_id(),
            actor=actor,
            mode="create",
            create=draft.create,
            messages=draft.messages,
            idempotency=conditions.idempotency(request, body),
            durability=conditions.durability(request),
            traceparent=_traceparent(),
        )
        written = await self._write(write)
        answer = self._whole(request, 201, created_page(written), written)
        answer.headers["Location"] = f"/api/threads/{written.row.id}"
        return answer

    async def put_thread(self, request: web.Request, actor: Principal) -> web.Response:
        thread_id = _thread_id(request)
        body = await read_body(request, self._body_bytes_max)
        draft = await _parse(body, self._read_thread, actor)
        if draft.id is not None and draft.id != thread_id:
            raise invalid("id", "is not the id in the path")
        expected = conditions.expectation(request)
        absent = conditions.must_be_absent(request)
        if absent and (expected.exists or expected.versions is not None):
            raise invalid("If-None-Match", "contradicts the version stated")
        if draft.visibility == "team":
            _check_team(draft.visibility, await self._team_of(thread_id, actor, absent_ok=True))
        write = Write(
            thread_id=thread_id,
            actor=actor,
            mode="create" if absent else "upsert",
            create=None if expected.exists else draft.create,
            patch=draft.patch,
            messages=draft.messages,
            expect=await self._expected(expected, thread_id, actor),
            durability=conditions.durability(request),
            traceparent=_traceparent(),
        )
        try:
            written = await self._write(write)
        except ThreadExists:
            raise StaleVersion(await self._version_of(thread_id, actor)) from None
        if written.created:
            return self._whole(request, 201, created_page(written), written)
        return self._whole(request, 200, await self._page_now(written, actor), written)

    async def append_messages(self, request: web.Request, actor: Principal) -> web.Response:
        thread_id = _thread_id(request)
        body = await read_body(request, self._body_bytes_max)
        write = Write(
            thread_id=thread_id,
            actor=actor,
            mode="update",
            messages=await _parse(body, self._read_messages),
            expect=await self._expected(conditions.expectation(request), thread_id, actor),
            idempotency=conditions.idempotency(request, body),
            durability=conditions.durability(request),
            traceparent=_traceparent(),
        )
        written = await self._write(write)
        minimal = conditions.prefers_minimal(request)
        headers = self._written_headers(written, written.version)
        if minimal:
            headers["Preference-Applied"] = "return=minimal"
        return self._json(200, appended_json(written, minimal=minimal), headers)

    async def patch_thread(self, request: web.Request, actor: Principal) -> web.Response:
        thread_id = _thread_id(request)
        body = await read_body(request, self._body_bytes_max)
        patch, visibility = read_patch(body, mint=self._mint)
        if visibility == "team":
            _check_team(visibility, await self._team_of(thread_id, actor, absent_ok=False))
        write = Write(
            thread_id=thread_id,
            actor=actor,
            mode="update",
            patch=patch,
            expect=await self._expected(conditions.expectation(request), thread_id, actor),
            idempotency=conditions.idempotency(request, body),
            durability=conditions.durability(request),
            traceparent=_traceparent(),
        )
        written = await self._write(write)
        headers = self._written_headers(written, written.row.version)
        headers["ETag"] = f'"{written.row.version}"'
        return self._json(200, summary_json(written.row, self._holder_of(written.row)), headers)

    async def delete_thread(self, request: web.Request, actor: Principal) -> web.Response:
        thread_id = _thread_id(request)
        write = Write(
            thread_id=thread_id,
            actor=actor,
            mode="update",
            delete=deletion(self._mint),
            expect=await self._expected(conditions.expectation(request), thread_id, actor),
            durability=conditions.durability(request),
            traceparent=_traceparent(),
        )
        written = await self._store.write(write)
        return web.Response(status=204, headers=self._written_headers(written, written.version))

    # ------------------------------------------------------------ streaming

    async def thread_events(self, request: web.Request, actor: Principal) -> web.StreamResponse:
        return await self._streams.of_thread(request, actor, _thread_id(request), self._sync_headers)

    async def all_events(self, request: web.Request, actor: Principal) -> web.StreamResponse:
        return await self._streams.of_caller(request, actor, {"X-Served-Region": self._region})

    # ------------------------------------------------------------ what they share

    def _position(self, number: int) -> str:
        return str(Position(self._incarnation(), number))

    def _now(self) -> str:
        return rfc3339(int(self._clock.time() * 1_000) * 1_000)

    def _read_thread(self, body: bytes, actor: Principal) -> ThreadDraft:
        return read_thread(body, actor=actor, region=self._region, mint=self._mint, now=self._now())

    def _read_messages(self, body: bytes) -> tuple[Draft, ...]:
        return read_messages(body, mint=self._mint, now=self._now())

    async def _write(self, write: Write) -> Written:
        written = await self._store.write(write)
        if written.row.deleted:
            # The answer to a request that came before, about a thread that was deleted since.
            raise ThreadNotFound(written.row.id)
        return written

    async def _expected(self, expected: conditions.Expectation, thread_id: str, actor: Principal) -> Version | None:
        """The version a write is based on. Of several tags the one that holds now; the store looks again."""
        if expected.versions is None:
            return None
        if len(expected.versions) == 1:
            return expected.versions[0]
        current = await self._version_of(thread_id, actor)
        if current not in expected.versions:
            raise StaleVersion(current)
        return current

    async def _version_of(self, thread_id: str, actor: Principal) -> Version:
        return (await self._store.read(thread_id, actor, limit=1)).row.version

    async def _team_of(self, thread_id: str, actor: Principal, *, absent_ok: bool) -> str | None:
        """The team a thread belongs to, which never changes; of one still to be created, the caller's."""
        try:
            return (await self._store.read(thread_id, actor, limit=1)).row.team
        except ThreadNotFound:
            if not absent_ok:
                raise
            return actor.team

    async def _page_now(self, written: Written, actor: Principal) -> ThreadPage:
        try:
            return await self._store.read(written.row.id, actor)
        except StoreError:
            # The write is durable whatever became of the thread since; what it left is the answer.
            return ThreadPage(written.row, ())

    def _whole(self, request: web.Request, status: int, found: ThreadPage, written: Written) -> web.Response:
        """A thread as the answer to a write, or its summary when that is preferred."""
        headers = self._written_headers(written, found.row.version)
        headers["ETag"] = f'"{found.row.version}"'
        if conditions.prefers_minimal(request):
            headers["Preference-Applied"] = "return=minimal"
            return self._json(status, summary_json(found.row, self._holder_of(found.row)), headers)
        return self._json(status, self._thread(found), headers)

    def _thread(self, found: ThreadPage) -> bytes:
        return thread_json(found, self._holder_of(found.row))

    def _json(self, status: int, body: bytes, headers: dict[str, str]) -> web.Response:
        headers["Content-Type"] = "application/json"
        return web.Response(status=status, body=body, headers=headers)

    def _sync_headers(self, row: Row) -> dict[str, str]:
        return {
            "Cache-Control": PRIVATE,
            "X-Sync-Version": f"{row.epoch}.{row.v}",
            "X-Origin-Region": self._holder_of(row),
            "X-Served-Region": self._region,
        }

    def _thread_headers(self, row: Row) -> dict[str, str]:
        return {**self._sync_headers(row), "ETag": f'"{row.epoch}.{row.v}"'}

    def _written_headers(self, written: Written, version: Version) -> dict[str, str]:
        headers = self._sync_headers(written.row)
        headers["X-Sync-Version"] = str(version)
        headers[conditions.POSITION_HEADER] = self._position(written.position)
        if written.pending:
            headers["X-Sync-Pending"] = ", ".join(written.pending)
        return headers


async def read_body(request: web.Request, bytes_max: int) -> bytes:
    """The JSON body, at most `bytes_max` also after decompression."""
    _check_type(request)
    if (request.content_length or 0) > bytes_max:
        raise _too_large(bytes_max)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size > bytes_max:
            raise _too_large(bytes_max)
        chunks.append(chunk)
    return b"".join(chunks)


def _check_type(request: web.Request) -> None:
    given = request.headers.get("Content-Type")
    if given is None:
        return
    media, _, rest = given.partition(";")
    charset = re.search(r"charset\s*=\s*\"?([\w.-]+)", rest, re.IGNORECASE)
    if _JSON_TYPE.fullmatch(media.strip()) is None or (
        charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii")
    ):
        raise Problem(
            415,
            "unsupported-media-type",
            f"Content-Type: {given[:100]!r} is not understood; send application/json in UTF-8",
            headers={"Accept": "application/json"},
            extra={"field": "Content-Type"},
        )


async def _parse(body: bytes, read: Callable[Concatenate[bytes, P], T], *args: P.args, **more: P.kwargs) -> T:
    """Turn a body into drafts; a large one beside the event loop, which others wait for."""
    if len(body) <= PARSE_INLINE_BYTES_MAX:
        return read(body, *args, **more)
    return await asyncio.to_thread(read, body, *args, **more)


def _too_large(bytes_max: int) -> Problem:
    return Problem(
        413,
        "body-too-large",
        f"body: it is over the limit of {bytes_max:,} bytes ({bytes_max / (1 << 20):g} MiB)",
        extra={"field": "body", "limit_bytes": bytes_max},
    )


def _thread_id(request: web.Request) -> str:
    """The id in the path; what is not a UUID is no thread's."""
    thread_id = thread_id_from(request.match_info["id"])
    if thread_id is None:
        raise not_found()
    return thread_id


def _check_team(visibility: Visibility | None, team: str | None) -> None:
    if visibility == "team" and team is None:
        raise invalid("visibility", "'team' needs a team, and this thread's owner had none; allowed: private, public")


def _traceparent() -> str:
    trace = current_trace.get()
    return "" if trace is None else str(trace)


def _validated(request: web.Request, body: bytes, headers: dict[str, str]) -> web.Response:
    """200 with a strong tag of the body, or 304 when the client has these bytes."""
    headers["ETag"] = tag = strong_tag(body)
    if conditions.not_modified(request, tag):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers)
