"""The route table's vocabulary, and the two documents made from a table: OpenAPI 3.1 and a page to read.

A table of routes is the one source: the router, `/openapi.json` and `/docs` all come from it, so that
none can promise what another does not keep. Schemas come from the types that decode requests and
describe answers. This file knows no route and serves nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from infra.problem import CONTENT_TYPE as PROBLEM_TYPE

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
Handler = TypeVar("Handler")

JSON: Final = "application/json"
_REF: Final = "#/components/schemas/{name}"


class ProblemDetails(msgspec.Struct):
    """RFC 9457. A problem may have further members, such as `field` or `current_version`."""

    type: str
    title: str
    status: int
    detail: str
    trace_id: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a route; `kind` is the type its schema is made from."""

    name: str
    where: Literal["path", "query", "header"]
    kind: Any
    description: str
    required: bool = False
    example: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a route; `kind` None: it has no body, or one without a schema when `media` says so."""

    status: int
    description: str
    kind: Any = None
    media: str | None = None
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Route(Generic[Handler]):
    """One method of one path: how it is served and how it is described."""

    method: Method
    path: str
    handler: Handler
    operation: str
    summary: str
    description: str = ""
    params: tuple[Param, ...] = ()
    body: Any = None
    answers: tuple[Answer, ...] = ()
    public: bool = False
    """Served without an identity."""
    stream: bool = False
    """Answers for as long as the client stays; there is no HEAD for it."""


def document(routes: Sequence[Route[Any]], *, title: str, version: str, description: str) -> bytes:
    """The OpenAPI 3.1 document of a table, as JSON."""
    kinds = [*_kinds(routes), ProblemDetails]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of = {id(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return msgspec.json.format(
        msgspec.json.encode(
            {
                "openapi": "3.1.0",
                "info": {"title": title, "version": version, "description": description},
                "servers": [{"url": "/"}],
                "security": [{"bearer": []}],
                "paths": paths,
                "components": {
                    "schemas": components,
                    "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
                },
            }
        ),
        indent=1,
    )


def _kinds(routes: Iterable[Route[Any]]) -> list[Any]:
    found: list[Any] = []
    for route in routes:
        found += [param.kind for param in route.params]
        found += [answer.kind for answer in route.answers if answer.kind is not None]
        if route.body is not None:
            found.append(route.body)
    return found


def _operation(route: Route[Any], schema_of: dict[int, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": route.operation, "summary": route.summary}
    if route.description:
        operation["description"] = route.description
    if route.public:
        operation["security"] = []
    if route.params:
        operation["parameters"] = [_parameter(param, schema_of) for param in route.params]
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schema_of[id(route.body)]}},
        }
    responses = {str(answer.status): _response(answer, schema_of) for answer in route.answers}
    responses["default"] = {
        "description": "Anything else is a problem.",
        "content": {PROBLEM_TYPE: {"schema": schema_of[id(ProblemDetails)]}},
    }
    operation["responses"] = responses
    return operation


def _parameter(param: Param, schema_of: dict[int, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": param.name,
        "in": param.where,
        "required": param.required or param.where == "path",
        "description": param.description,
        "schema": schema_of[id(param.kind)],
    }
    if param.example is not None:
        shown["example"] = param.example
    return shown


def _response(answer: Answer, schema_of: dict[int, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": answer.description}
    if answer.headers:
        shown["headers"] = {name: {"schema": {"type": "string"}} for name in answer.headers}
    if answer.kind is not None:
        shown["content"] = {answer.media or JSON: {"schema": schema_of[id(answer.kind)]}}
    elif answer.media is not None:
        shown["content"] = {answer.media: {}}
    return shown


# ---------------------------------------------------------------- the page to read

_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1e21;"
    "background:#fff}h2{font:600 1rem ui-monospace,monospace;margin:2.5rem 0 .25rem;padding:.4rem .6rem;"
    "background:#f0f2f5;border-radius:6px}h2 b{color:#0b57d0}table{border-collapse:collapse;width:100%;"
    "font-size:.9rem}th,td{text-align:left;vertical-align:top;padding:.25rem .6rem;border-top:1px solid #ddd}"
    "code,pre{font:.85rem/1.45 ui-monospace,monospace}pre{background:#f0f2f5;padding:.6rem;overflow-x:auto;"
    "border-radius:6px}a{color:#0b57d0}summary{cursor:pointer;margin:.4rem 0}@media(prefers-color-scheme:dark){"
    "body{background:#16181c;color:#e4e6ea}h2,pre{background:#23262c}th,td{border-color:#3a3d44}"
    "a,h2 b{color:#8ab4f8}}"
)


def style_policy(style: str) -> str:
    """A Content-Security-Policy under which a page may show itself with one inline style, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


REFERENCE_POLICY: Final = style_policy(_STYLE)


def reference(routes: Sequence[Route[Any]], openapi: bytes, *, title: str) -> bytes:
    """The table as one HTML page without any other file."""
    schemas: dict[str, Any] = msgspec.json.decode(openapi)["components"]["schemas"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1><p>Machine-readable: <a href=/openapi.json>/openapi.json</a>. Every error is a "
        f"problem ({escape(PROBLEM_TYPE)}, RFC 9457).</p><ul>"
    ]
    parts += [
        f"<li><a href=#{route.operation}><code>{route.method} {escape(route.path)}</code></a> "
        f"{escape(route.summary)}</li>"
        for route in routes
    ]
    parts.append("</ul>")
    parts += [_section(route) for route in routes]
    parts.append("<h1>Types</h1>")
    for name, schema in schemas.items():
        text = msgspec.json.format(msgspec.json.encode(schema), indent=2).decode()
        parts.append(
            f"<details id=type-{escape(name)}><summary><code>{escape(name)}</code></summary>"
            f"<pre>{escape(text)}</pre></details>"
        )
    return "".join(parts).encode()


def _section(route: Route[Any]) -> str:
    parts = [f"<h2 id={route.operation}><b>{route.method}</b> {escape(route.path)}</h2><p>{escape(route.summary)}"]
    if route.description:
        parts.append(f" {escape(route.description)}")
    parts.append(" No token is needed.</p>" if route.public else "</p>")
    if route.params:
        rows = "".join(
            f"<tr><td><code>{escape(param.name)}</code><td>{param.where}<td>{escape(param.description)}"
            for param in route.params
        )
        parts.append(f"<table><tr><th>Parameter<th>In<th>Meaning{rows}</table>")
    if route.body is not None:
        parts.append(f"<p>Body: {_type_link(route.body)}</p>")
    rows = "".join(
        f"<tr><td>{answer.status}<td>{escape(answer.description)}<td>"
        f"{_type_link(answer.kind) if answer.kind is not None else escape(answer.media or '')}"
        for answer in route.answers
    )
    parts.append(f"<table><tr><th>Answer<th>Meaning<th>Body{rows}</table>")
    return "".join(parts)


def _type_link(kind: Any) -> str:
    return f"<a href=#type-{kind.__name__}><code>{kind.__name__}</code></a>"
