"""The thread API as one table: what is served, how it is described, and who is let in.

The router, `/openapi.json` and `/docs` all come from `ROUTES`, so none can promise what another does not
keep. Users' own tokens are verified by the edge; here the identity the edge signed is believed and nothing
else. What a handler does is in `origin.handlers`, problems are in `origin.problems`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final, Literal

from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import Meta

from infra.clock import SYSTEM_CLOCK, Clock
from infra.identity import IDENTITY_HEADER, IdentityError, IdentityVerifier, Principal
from infra.problem import CONTENT_TYPE as PROBLEM_TYPE
from infra.server import Lifecycle
from origin.answers import PAGE_MESSAGES_MAX, Appended, Cursor, OtherRegion, Regions, Summary, Thread, Threads
from origin.conditions import IDEMPOTENCY_KEY_CHARS_MAX, Consistency
from origin.events import EventStreams
from origin.feed import Feed
from origin.handlers import BODY_BYTES_MAX, QUERY_CHARS_MAX, THREADS_MAX, ThreadHandlers
from origin.ids import IdMint
from origin.openapi import REFERENCE_POLICY, Answer, Param, ProblemDetails, Route, document, reference
from origin.problems import unauthorized
from origin.requests import NewMessages, NewThread, ThreadId, ThreadPatch
from origin.store.base import (
    Durability,
    ThreadStore,
)
from origin.thread import Row

ThreadHandler = Callable[[ThreadHandlers, web.Request, Principal], Awaitable[web.StreamResponse]]

NOBODY: Final = Principal(issuer="", subject="")
"""Who asks for what needs no identity."""

TITLE: Final = "Weft"
DESCRIPTION: Final = "Threads of AI coding assistants, stored once and read everywhere."

_Tag = Annotated[str, Meta(description='entity tags such as "1.7", or *')]
_VersionText = Annotated[str, Meta(pattern=r"^\d{1,15}\.\d{1,15}$")]
_PositionText = Annotated[str, Meta(pattern=r"^[0-9A-Za-z-]{1,64}:\d{1,18}$")]
_Key = Annotated[str, Meta(min_length=1, max_length=IDEMPOTENCY_KEY_CHARS_MAX)]
_ThreadsLimit = Annotated[int, Meta(ge=1, le=THREADS_MAX)]
_MessagesLimit = Annotated[int, Meta(ge=1, le=PAGE_MESSAGES_MAX)]
_QueryText = Annotated[str, Meta(min_length=1, max_length=QUERY_CHARS_MAX)]

ID: Final = Param("id", "path", ThreadId, "The thread's id.")
CONSISTENCY: Final = Param(
    "consistency",
    "query",
    Consistency,
    "local: what this region has applied (default); origin: as new as the holder's.",
)
MIN_VERSION: Final = Param(
    "X-Sync-Min-Version", "header", _VersionText, "Do not answer from before this version (epoch.v).", example="1.7"
)
MIN_POSITION: Final = Param(
    "X-Sync-Min-Position", "header", _PositionText,
    "Do not answer from before this: X-Sync-Position of a write or of another listing, also another region's.",
    example="019ab0c4e2d1a7c1f0b3d5e79a2c4e6f:42",
)  # fmt: skip
IF_NONE_MATCH: Final = Param("If-None-Match", "header", _Tag, "304 when the client has this already.")
LISTING: Final = (
    Param("limit", "query", _ThreadsLimit, f"Threads per page: 50 by default, at most {THREADS_MAX}."),
    Param("cursor", "query", str, "next_cursor of the page before."),
    Param("scope", "query", Literal["mine", "team"], "mine: the caller's own (default); team: shared with the team."),
    Param("archived", "query", Literal["true", "false", "any"], "false by default."),
    CONSISTENCY,
    MIN_POSITION,
    IF_NONE_MATCH,
)
PAGE: Final = (
    Param("after", "query", Cursor, "Messages behind this place (epoch.seq, as in next_after).", example="1.7"),
    Param("limit", "query", _MessagesLimit, f"Messages per page, at most {PAGE_MESSAGES_MAX:,} (default) or 8 MiB."),
)
BASED_ON: Final = (
    Param("If-Match", "header", _Tag, "412 unless the thread is at this version; * for any.", example='"1.7"'),
    Param("X-Sync-Version", "header", _VersionText, "The same as If-Match, without quotes.", example="1.7"),
)
DURABILITY: Final = Param(
    "X-Sync-Durability", "header", Durability, "Who must hold the write before it is answered: the thread's region, "
    "a majority of regions, or all.",
)  # fmt: skip
KEY: Final = Param(
    "Idempotency-Key", "header", _Key, "The same key and request within 24 h get the first answer, and nothing twice."
)
PREFER: Final = Param("Prefer", "header", str, "return=minimal leaves out what the client just sent.")
RESUME: Final = Param("Last-Event-ID", "header", str, "The id of the last event received: all later ones follow.")

SYNC_HEADERS: Final = ("X-Sync-Version", "X-Origin-Region", "X-Served-Region")
WRITTEN_HEADERS: Final = (*SYNC_HEADERS, "X-Sync-Position", "X-Sync-Pending")
LISTED: Final = Answer(
    200, "A page of threads.", Threads, headers=("ETag", "Link", "X-Served-Region", "X-Sync-Position")
)
UNCHANGED: Final = Answer(304, "The client has it already.")
STREAM: Final = Answer(
    200,
    "Events message, patch, delete and reset; data is JSON with thread_id, version and the entry's own keys.",
    media="text/event-stream",
    headers=("X-Served-Region",),
)


def _problems(*statuses: int) -> tuple[Answer, ...]:
    return tuple(Answer(status, _MEANINGS[status], ProblemDetails, PROBLEM_TYPE) for status in statuses)


_MEANINGS: Final = {
    400: "The request is malformed; `field` says where.",
    401: "There is no valid token.",
    403: "The caller may read the thread but not do this.",
    404: "There is no such thread, or none the caller may know of.",
    409: "A message id exists with another body, the thread's id is taken, or entries moved.",
    410: "The caller's own thread was deleted; its id can't be used again.",
    412: "The thread is at another version; `current_version` says which.",
    413: "The body is over 16 MiB.",
    415: "The body is not JSON.",
    422: "The Idempotency-Key came before with another request.",
    503: "It can't be done now; Retry-After says when to try again. Nothing was written.",
    504: "Whether it was written is unknown; send it again with the same ids.",
    507: "The disk is full; nothing was written.",
}
_READ: Final = _problems(400, 401, 404, 409, 503)
_WRITE: Final = _problems(400, 401, 403, 404, 409, 412, 413, 415, 422, 503, 504, 507)

ROUTES: Final[tuple[Route[ThreadHandler], ...]] = (
    # In the order in which the router looks: what is asked most stands first.
    Route(
        "POST", "/api/threads/{id}/messages", ThreadHandlers.append_messages, "append_messages",
        "Append messages.",
        "A message id that is there with the same body is answered and not written again.",
        params=(ID, *BASED_ON, KEY, DURABILITY, PREFER),
        body=NewMessages,
        answers=(
            Answer(200, "The messages as stored.", Appended, headers=("Preference-Applied", *WRITTEN_HEADERS)),
            *_WRITE,
        ),
    ),
    Route(
        "GET", "/api/threads", ThreadHandlers.list_threads, "list_threads",
        "Threads, newest activity first.",
        params=LISTING,
        answers=(LISTED, UNCHANGED, *_problems(400, 401, 503)),
    ),
    Route(
        "GET", "/api/threads/list", ThreadHandlers.list_threads, "list_threads_alias",
        "The same as /api/threads.",
        params=LISTING,
        answers=(LISTED, UNCHANGED, *_problems(400, 401, 503)),
    ),
    Route(
        "GET", "/api/threads/search", ThreadHandlers.search_threads, "search_threads",
        "Threads whose title or messages hold all words.",
        params=(Param("q", "query", _QueryText, "The words to search for.", required=True), *LISTING),
        answers=(LISTED, UNCHANGED, *_problems(400, 401, 503)),
    ),
    Route(
        "POST", "/api/threads", ThreadHandlers.create_thread, "create_thread",
        "Create a thread, with messages if there are any.",
        "Its origin is the region reached. With an id of one's own it happens exactly once everywhere.",
        params=(KEY, DURABILITY, PREFER),
        body=NewThread,
        answers=(
            Answer(201, "Created.", Thread, headers=("Location", "ETag", "Preference-Applied", *WRITTEN_HEADERS)),
            *_problems(400, 401, 404, 409, 410, 413, 415, 422, 503, 504, 507),
        ),
    ),
    Route(
        "GET", "/api/threads/events", ThreadHandlers.all_events, "all_events",
        "Events of all threads of the caller and their team, as they happen.",
        params=(RESUME, Param("after", "query", str, "The same as Last-Event-ID, which wins.")),
        answers=(STREAM, *_problems(400, 401)),
        stream=True,
    ),
    Route(
        "GET", "/api/threads/{id}", ThreadHandlers.get_thread, "get_thread",
        "A thread with a page of its messages.",
        params=(ID, *PAGE, CONSISTENCY, MIN_VERSION, IF_NONE_MATCH),
        answers=(
            Answer(200, "The thread.", Thread, headers=("ETag", *SYNC_HEADERS)),
            UNCHANGED,
            *_READ,
        ),
    ),
    Route(
        "PUT", "/api/threads/{id}", ThreadHandlers.put_thread, "put_thread",
        "Create or complete a thread.",
        "Messages that are there are kept, new ones are appended, fields that are stated are set. What was read can be "
        "put back.",
        params=(
            ID, *BASED_ON,
            Param("If-None-Match", "header", _Tag, "*: only create; 412 when the thread exists.", example="*"),
            DURABILITY, PREFER,
        ),
        body=NewThread,
        answers=(
            Answer(200, "The thread now.", Thread, headers=("ETag", "Preference-Applied", *WRITTEN_HEADERS)),
            Answer(201, "Created.", Thread, headers=("ETag", "Preference-Applied", *WRITTEN_HEADERS)),
            *_WRITE, *_problems(410),
        ),
    ),
    Route(
        "PATCH", "/api/threads/{id}", ThreadHandlers.patch_thread, "patch_thread",
        "Set a thread's title, visibility, archived, metadata, relations or external_id.",
        params=(ID, *BASED_ON, KEY, DURABILITY),
        body=ThreadPatch,
        answers=(Answer(200, "The thread now.", Summary, headers=("ETag", *WRITTEN_HEADERS)), *_WRITE),
    ),
    Route(
        "DELETE", "/api/threads/{id}", ThreadHandlers.delete_thread, "delete_thread",
        "Delete a thread, for good.",
        params=(ID, *BASED_ON, DURABILITY),
        answers=(
            Answer(204, "Deleted.", headers=WRITTEN_HEADERS),
            *_problems(400, 401, 403, 404, 412, 503, 504, 507),
        ),
    ),
    Route(
        "GET", "/api/threads/{id}/events", ThreadHandlers.thread_events, "thread_events",
        "Events of one thread, as they happen.",
        params=(ID, RESUME, Param("after", "query", Cursor, "The same as Last-Event-ID, which wins.")),
        answers=(STREAM, *_problems(400, 401, 404, 503)),
        stream=True,
    ),
    Route(
        "GET", "/api/regions", ThreadHandlers.list_regions, "list_regions",
        "The regions, and how far the others are behind this one.",
        answers=(Answer(200, "As this one sees them.", Regions, headers=("X-Served-Region",)), *_problems(401)),
    ),
    Route(
        "GET", "/t/{id}", ThreadHandlers.thread_page, "thread_page",
        "A public thread as a page.",
        params=(ID, Param("after", "query", Cursor, "Messages behind this place.", example="1.7"), IF_NONE_MATCH),
        answers=(Answer(200, "The page.", media="text/html"), UNCHANGED, *_problems(404, 409)),
        public=True,
    ),
    Route(
        "GET", "/openapi.json", ThreadHandlers.openapi_document, "openapi_document",
        "This API as an OpenAPI 3.1 document.",
        params=(IF_NONE_MATCH,),
        answers=(Answer(200, "The document.", media="application/json"), UNCHANGED),
        public=True,
    ),
    Route(
        "GET", "/", ThreadHandlers.reference_page, "front_page",
        "Where a browser begins: this API as a page to read.",
        params=(IF_NONE_MATCH,),
        answers=(Answer(200, "The page.", media="text/html"), UNCHANGED),
        public=True,
    ),
    Route(
        "GET", "/docs", ThreadHandlers.reference_page, "reference_page",
        "This API as a page to read.",
        params=(IF_NONE_MATCH,),
        answers=(Answer(200, "The page.", media="text/html"), UNCHANGED),
        public=True,
    ),
)  # fmt: skip

BESIDE: Final[tuple[Route[None], ...]] = (
    Route(
        "GET", "/api/auth/verify", None, "verify_token",
        "The claims of the caller's token, when it holds.",
        answers=(Answer(200, "The claims.", dict[str, Any]), *_problems(401)),
    ),
    Route("GET", "/healthz", None, "alive", "The process lives.", answers=(Answer(200, "It does."),), public=True),
    Route(
        "GET", "/readyz", None, "ready", "Whether requests should be sent here; not while draining.",
        answers=(Answer(200, "They should."), Answer(503, "They should not; `checks` says why.")),
        public=True,
    ),
    Route(
        "GET", "/metrics", None, "metrics", "Measurements in Prometheus' text format.",
        answers=(Answer(200, "The measurements.", media="text/plain"),),
        public=True,
    ),
)  # fmt: skip
"""What every edge answers by itself: described with the rest, routed elsewhere."""


def add_thread_api(
    app: web.Application,
    *,
    store: ThreadStore,
    feed: Feed,
    verifier: IdentityVerifier,
    mint: IdMint,
    region: str,
    holder_of: Callable[[Row], str],
    others: Callable[[], Awaitable[Sequence[OtherRegion]]],
    lifecycle: Lifecycle,
    clock: Clock = SYSTEM_CLOCK,
    body_bytes_max: int = BODY_BYTES_MAX,
) -> None:
    """Mount every route of `ROUTES`. Streams end when `lifecycle` drains.

    The caller starts and stops `feed`, notifies it of commits, and installs the problem middleware.
    """
    described = document((*ROUTES, *BESIDE), title=TITLE, version=_version(), description=DESCRIPTION)
    handlers = ThreadHandlers(
        store=store,
        streams=EventStreams(store, feed, clock),
        mint=mint,
        region=region,
        holder_of=holder_of,
        others=others,
        incarnation=lambda: feed.incarnation,
        clock=clock,
        openapi=described,
        reference=reference((*ROUTES, *BESIDE), described, title=f"{TITLE} API"),
        reference_policy=REFERENCE_POLICY,
        body_bytes_max=body_bytes_max,
    )
    for route in ROUTES:
        handler = _open(route, handlers) if route.public else _guarded(route, handlers, verifier)
        if route.method == "GET":
            app.router.add_get(_pattern(route.path), handler, allow_head=not route.stream)
        else:
            app.router.add_route(route.method, _pattern(route.path), handler)

    async def end_streams(app: web.Application) -> AsyncIterator[None]:
        async def watch() -> None:
            await lifecycle.draining.wait()
            feed.end()

        task = asyncio.create_task(watch())
        yield
        task.cancel()

    app.cleanup_ctx.append(end_streams)


def _pattern(path: str) -> str:
    """`path` for the router: an id is none of the names beside it, else a 405 of theirs would allow what is its own."""
    folder, _, last = path.rpartition("/")
    if last != "{id}":
        return path
    beside = [name for there, _, name in (it.path.rpartition("/") for it in ROUTES) if there == folder and name != last]
    return f"{folder}/{{id:(?!(?:{'|'.join(beside)})$)[^{{}}/]+}}" if beside else path


def _open(route: Route[ThreadHandler], handlers: ThreadHandlers) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await route.handler(handlers, request, NOBODY)

    return handle


def _guarded(route: Route[ThreadHandler], handlers: ThreadHandlers, verifier: IdentityVerifier) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await route.handler(handlers, request, caller(request, verifier))

    return handle


def caller(request: web.Request, verifier: IdentityVerifier) -> Principal:
    """Who asks, as the edge has signed it; 401 when nobody has."""
    tokens = request.headers.getall(IDENTITY_HEADER, ())
    if len(tokens) != 1:
        raise unauthorized("A request needs the identity of its user, once.")
    try:
        principal = verifier.verify(tokens[0]).principal
    except IdentityError as error:
        raise unauthorized(f"The identity is not to be believed: {error}.") from None
    if principal is None:
        raise unauthorized("The identity names a process, not a user.")
    return principal


def _version() -> str:
    try:
        return version("weft")
    except PackageNotFoundError:
        return "0"
