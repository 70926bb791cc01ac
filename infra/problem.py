"""Problem details (RFC 9457): every error answer of every process has one shape, built here.

Promise: `type, title, status, detail, trace_id, retryable` in `application/problem+json`, and a middleware
that turns whatever a handler raises into one. Left to others: which domain error is which problem; each floor
hands the middleware one translation table.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Final

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from infra.trace import current_trace_id

TYPE_ROOT: Final = "https://weft.dev/problems/"
CONTENT_TYPE: Final = "application/problem+json"
RETRYABLE_STATUSES: Final = frozenset({429, 502, 503, 504, 507})

# What aiohttp itself raises, in our words: (kind, detail). The rest take their reason phrase.
_HTTP_KINDS: Final[Mapping[int, tuple[str, str]]] = {
    404: ("not-found", "Nothing is served at this path."),
    405: ("method-not-allowed", "This path does not take this method; see the Allow header."),
    413: ("body-too-large", "The request body is over the limit."),
    417: ("expectation-failed", "The only expectation understood is 100-continue."),
}

log = logging.getLogger(__name__)


class Problem(Exception):
    """An error as its reader will see it.

    `kind` is a kebab-case name, the last part of the type URL. `detail` is one sentence for this occurrence,
    and names the field when a field is wrong. `extra` adds members; the six standard ones cannot be
    overridden.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        title: str | None = None,
        retryable: bool | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(f"{status} {kind}: {detail}")
        self.status = status
        self.kind = kind
        self.detail = detail
        self.title = title if title is not None else kind.replace("-", " ").capitalize()
        self.retryable = retryable if retryable is not None else status in RETRYABLE_STATUSES
        self.headers: Mapping[str, str] = headers or {}
        self.extra: Mapping[str, object] = extra or {}

    @property
    def type(self) -> str:
        return TYPE_ROOT + self.kind

    def json(self, trace_id: str = "") -> bytes:
        members: dict[str, object] = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "trace_id": trace_id,
            "retryable": self.retryable,
        }
        return orjson.dumps({**members, **{k: v for k, v in self.extra.items() if k not in members}})


def problem_response(problem: Problem, trace_id: str = "") -> web.Response:
    """The answer that carries `problem`; without a `trace_id` the current trace's is used."""
    return web.Response(
        status=problem.status,
        body=problem.json(trace_id or current_trace_id()),
        content_type=CONTENT_TYPE,
        headers=problem.headers,
    )


def problem_middleware(translate: Callable[[Exception], Problem | None]) -> Middleware:
    """A middleware that answers with a problem whatever a handler raises.

    `translate` maps a domain error to its problem, None for what it does not know; that becomes a logged 500.
    Redirects pass, and so do cancellation and a lost connection: nobody is left to read an answer.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as exc:
            return answer_to(exc, request, translate)

    return middleware


def answer_to(
    exc: Exception, request: web.BaseRequest, translate: Callable[[Exception], Problem | None]
) -> web.Response:
    """The problem that answers `request`, whose handler raised `exc`; raises what is for nobody to read."""
    if isinstance(exc, Problem):
        problem = exc
    elif isinstance(exc, web.HTTPException):
        if exc.status < 400:
            raise exc
        problem = _from_http(exc)
    elif isinstance(exc, ConnectionResetError):
        raise exc
    else:
        translated = translate(exc)
        if translated is None:
            log.error("%s %s failed", request.method, request.path, exc_info=exc)
            detail = "The server failed to handle the request; quote the trace_id when reporting it."
            translated = Problem(500, "internal", detail, title="Internal server error")
        problem = translated
    if request.writer.output_size > 0:
        # The answer has begun: a second one inside its body would be read as content. Cutting the
        # connection is the one way left to tell the reader that what arrived is not whole.
        log.warning("%s %s failed while answering: %s", request.method, request.path, problem)
        raise ConnectionResetError("the answer had begun")
    return problem_response(problem)


def _from_http(exc: web.HTTPException) -> Problem:
    kind, detail = _HTTP_KINDS.get(exc.status, (_kebab(exc.reason), exc.text or exc.reason))
    headers = {name: exc.headers[name] for name in ("Allow", "Retry-After") if name in exc.headers}
    if isinstance(exc, web.HTTPRequestEntityTooLarge) and exc.text:
        detail = f"{detail[:-1]}: {exc.text[0].lower()}{exc.text[1:]}."
    return Problem(exc.status, kind, detail, headers=headers)


def _kebab(reason: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", reason.lower()).strip("-") or "http-error"
