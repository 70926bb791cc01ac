"""The surface of the thread API: one table behind router and documents, a locked door, and clear refusals."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from typing import Any

import msgspec
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.identity import IDENTITY_HEADER, IdentitySigner
from origin import answers, requests
from origin.api import BESIDE, ROUTES
from origin.openapi import Route
from origin.problems import translate
from origin.store import base, replication
from origin.store.base import StoreError
from origin.thread import Version
from tests.support.builders import ANN, BOB, user
from tests.support.fakeclock import FakeClock
from tests.support.thread_api import KEY, Api

ENGINES = ("memory",)
ABSENT = "0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3aff"
JSON = {"Content-Type": "application/json"}
MESSAGE = {"messages": [{"role": "user", "content": "x"}]}
BODIES: dict[str, Any] = {
    "create_thread": {},
    "put_thread": {},
    "patch_thread": {"title": "x"},
    "append_messages": MESSAGE,
}
route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
guarded = pytest.mark.parametrize(
    "route", [route for route in ROUTES if not route.public], ids=lambda route: route.operation
)
of_a_thread = pytest.mark.parametrize(
    "route", [route for route in ROUTES if "{id}" in route.path], ids=lambda route: route.operation
)
with_body = pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.body is not None], ids=lambda route: route.operation
)


def filled(route: Route[Any], thread_id: str = ABSENT) -> str:
    path = route.path.replace("{id}", thread_id)
    return path + "?q=word" if route.operation == "search_threads" else path


# ---------------------------------------------------------------- one table


async def test_the_router_the_document_and_the_table_hold_the_same_routes(api: Api):
    app = api.client.app
    served = {
        (served.method, served.resource.canonical)
        for served in app.router.routes()
        if served.resource is not None and served.method != "HEAD"
    }
    described = {
        (method.upper(), path)
        for path, methods in (await api("GET", "/openapi.json", actor=None)).json["paths"].items()
        for method in methods
    }
    table = {(route.method, route.path) for route in ROUTES}
    beside = {(route.method, route.path) for route in BESIDE}
    assert served == table == described - beside
    assert beside <= described
    assert len(table) == len(ROUTES)


async def test_the_document_is_valid_openapi(api: Api):
    validator = pytest.importorskip("openapi_spec_validator")
    answer = await api("GET", "/openapi.json", actor=None)
    assert answer.headers["Content-Type"] == "application/json"
    validator.validate(answer.json)
    assert answer.json["openapi"].startswith("3.1.")


async def test_every_operation_is_described_in_full(api: Api):
    document = (await api("GET", "/openapi.json", actor=None)).json
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(ROUTES) + len(BESIDE)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], path
            named = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
            assert ("requestBody" in operation) == (method in ("post", "put", "patch"))
            assert "default" in operation["responses"]
            assert ("401" in operation["responses"]) == (operation.get("security") != [])


async def test_the_reference_page_names_every_route_and_needs_no_other_file(api: Api):
    answer = await api("GET", "/docs", actor=None)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    text = answer.body.decode()
    for route in ROUTES:
        assert f"<b>{route.method}</b> {route.path}" in text
        for param in route.params:
            assert f"<code>{param.name}</code>" in text
    assert not re.search(r"<(script|link|img|iframe)\b|\bsrc=|@import|url\(", text)


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
async def test_the_documents_have_tags(api: Api, path: str):
    first = await api("GET", path, actor=None)
    again = await api("GET", path, actor=None, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")


async def test_answers_are_of_the_types_that_describe_them(api: Api):
    """Every key, and no other: a client generated from the document reads what is sent."""
    thread = await api.create(user("ann", team="core"), metadata={"a": 1}, messages=MESSAGE["messages"])
    path = f"/api/threads/{thread['id']}"
    ann = user("ann", team="core")
    shown = {
        answers.Thread: (await api("GET", path, actor=ann)).json,
        answers.Summary: (await api("PATCH", path, {"title": "x"}, ann)).json,
        answers.Threads: (await api("GET", "/api/threads", actor=ann)).json,
        answers.Appended: (await api("POST", f"{path}/messages", MESSAGE, ann)).json,
    }
    for kind, value in shown.items():
        msgspec.convert(value, kind)
        assert set(value) == set(kind.__struct_fields__), kind
    assert set(shown[answers.Threads]["threads"][0]) == set(answers.Summary.__struct_fields__)
    assert set(shown[answers.Thread]["messages"][0]) == set(answers.Message.__struct_fields__)


async def test_every_documented_field_of_a_body_is_honoured(api: Api):
    """A field in a request schema changes what is read back."""
    given: dict[str, Any] = {
        "id": ABSENT,
        "title": "T",
        "visibility": "public",
        "archived": True,
        "external_id": "e",
        "relations": [{"type": "copy"}],
        "metadata": {"m": 1},
        "created_at": "2020-01-01T00:00:00Z",
        "messages": [
            {
                "id": "m",
                "role": "tool",
                "content": [{"type": "text", "text": "x"}],
                "created_at": "2020-01-02T00:00:00Z",
                "parent_id": "p",
                "usage": {"u": 1},
                "metadata": {"n": 2},
            }
        ],
    }
    assert set(given) == set(requests.NewThread.__struct_fields__)
    assert set(given["messages"][0]) == set(requests.NewMessage.__struct_fields__)
    await api.create(**given)
    read = (await api("GET", f"/api/threads/{ABSENT}")).json
    given["messages"][0]["seq"] = 2
    assert {key: read[key] for key in given} == given
    changed = {"title": "U", "visibility": "private", "archived": False, "metadata": {}, "relations": []}
    changed["external_id"] = None
    assert set(changed) == set(requests.ThreadPatch.__struct_fields__)
    await api("PATCH", f"/api/threads/{ABSENT}", changed)
    read = (await api("GET", f"/api/threads/{ABSENT}")).json
    assert {key: read[key] for key in changed} == changed


async def _listing_differs(api: Api, path: str, name: str) -> bool:
    """Whether a listing parameter changes the question that the store is asked."""
    values = {"q": "b", "limit": "7", "scope": "team", "archived": "any", "consistency": "origin"}
    words = "" if name == "q" else "q=a&"
    await api("GET", f"{path}?q=a")
    before = api.store.queries[-1]
    if name == "X-Sync-Min-Position":
        await api("GET", f"{path}?q=a", headers={name: f"{api.feed.incarnation}:0"})
    else:
        await api("GET", f"{path}?{words}{name}={values[name]}")
    return api.store.queries[-1] != before


async def test_every_documented_parameter_is_honoured(api: Api):
    """One probe for each; a parameter added to the table without one fails here."""
    core = user("ann", team="core")
    thread = await api.create(core, visibility="public", messages=[{"role": "user", "content": c} for c in "abc"])
    await api.fed()
    path = f"/api/threads/{thread['id']}"
    two = "1.3"

    async def listing(where: str, name: str) -> bool:
        if name == "If-None-Match":
            tag = (await api("GET", f"{where}?q=a")).headers["ETag"]
            return (await api("GET", f"{where}?q=a", headers={name: tag})).status == 304
        if name == "cursor":
            return (await api("GET", f"{where}?q=a&cursor=bad")).status == 400
        return await _listing_differs(api, where, name)

    async def page(where: str, name: str) -> bool:
        if name in ("If-None-Match", "X-Sync-Min-Version"):
            value = "*" if name == "If-None-Match" else "1.99"
            return (await api("GET", where, headers={name: value})).status in (304, 503)
        if name == "consistency":
            await api("GET", f"{where}?consistency=origin")
            return api.store.freshness[-1].consistency == "origin"
        plain, changed = await api("GET", where), await api("GET", f"{where}?{name}={two if name == 'after' else 1}")
        return plain.body != changed.body

    async def write(method: str, where: str, name: str, body: Any) -> bool:
        if name in ("If-Match", "X-Sync-Version"):
            value = '"9.9"' if name == "If-Match" else "9.9"
            return (await api(method, where, body, core, headers={name: value})).status == 412
        if name == "If-None-Match":
            return (await api(method, where, body, core, headers={name: "*"})).status == 412
        if name == "Prefer":
            answer = await api(method, where, body, core, headers={name: "return=minimal"})
            return answer.headers["Preference-Applied"] == "return=minimal"
        value = {"X-Sync-Durability": "all", "Idempotency-Key": f"key {method} {where}"}[name]
        await api(method, where, body, core, headers={name: value})
        sent = api.store.writes[-1]
        return sent.durability == "all" or (sent.idempotency is not None and sent.idempotency.key == value)

    async def stream(where: str, name: str) -> bool:
        cursor = two if where == path + "/events" else f"{api.store.engine.incarnation}:0"
        opened = await api.stream(
            f"{where}?after={cursor}" if name == "after" else where, core, last=cursor if name != "after" else None
        )
        return (await opened.event()).name in ("message", "patch")

    async def document(where: str, name: str) -> bool:
        tag = (await api("GET", where, actor=None)).headers["ETag"]
        if name == "If-None-Match":
            return (await api("GET", where, actor=None, headers={name: tag})).status == 304
        return (await api("GET", f"{where}?after={two}", actor=None)).headers["ETag"] != tag

    for route in ROUTES:
        where = filled(route, thread["id"]).partition("?")[0]
        for param in route.params:
            if param.where == "path":
                continue
            match route.operation:
                case "list_threads" | "list_threads_alias" | "search_threads":
                    honoured = await listing(where, param.name)
                case "get_thread":
                    honoured = await page(where, param.name)
                case "thread_events" | "all_events":
                    honoured = await stream(where, param.name)
                case "thread_page" | "openapi_document" | "reference_page" | "front_page":
                    honoured = await document(where, param.name)
                case "delete_thread":
                    fresh = await api.create(core)
                    honoured = await write("DELETE", f"/api/threads/{fresh['id']}", param.name, None)
                case operation:
                    honoured = await write(route.method, where, param.name, BODIES[operation])
            assert honoured, (route.operation, param.name)


# ---------------------------------------------------------------- the door


@guarded
async def test_nobody_is_let_in_without_an_identity(api: Api, route: Route[Any]):
    answer = await api(route.method, filled(route), BODIES.get(route.operation), actor=None)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    assert answer.headers["Content-Type"].startswith("application/problem+json")
    assert answer.json["type"].endswith("/unauthorized")


def forged(clock: FakeClock) -> dict[str, list[str]]:
    key = Ed25519PrivateKey.generate()
    mine, late = IdentitySigner(KEY, "edge:us-east", clock), FakeClock(clock.time() - 3_600)
    return {
        "another key": [IdentitySigner(key, "edge:us-east", clock).identity_token(ANN, "region:us-east")],
        "another audience": [mine.identity_token(ANN, "region:eu-west")],
        "expired": [IdentitySigner(KEY, "edge:us-east", late).identity_token(ANN, "region:us-east")],
        "a process, no user": [mine.service_token("region:us-east")],
        "twice": [mine.identity_token(ANN, "region:us-east"), mine.identity_token(BOB, "region:us-east")],
        "a bare name": ["ann"],
        "unsigned": ["eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4ifQ."],
        "empty": [""],
    }


@pytest.mark.parametrize("case", list(forged(FakeClock())))
async def test_an_identity_that_is_not_to_be_believed_is_not(api: Api, clock: FakeClock, case: str):
    headers = [(IDENTITY_HEADER, token) for token in forged(clock)[case]]
    answer = await api("GET", "/api/threads", actor=None, headers=headers)
    assert answer.status == 401
    assert "WWW-Authenticate" in answer.headers


async def test_headers_that_claim_a_user_change_nothing(api: Api):
    thread = await api.create(ANN)
    for name in ("X-User-Id", "X_User_Id", "X-Weft-User", "Authorization", "X-Forwarded-User"):
        answer = await api("GET", f"/api/threads/{thread['id']}", actor=BOB, headers={name: "ann"})
        assert answer.status == 404


@of_a_thread
@pytest.mark.parametrize("visibility", ["private", "team"])
async def test_anothers_thread_is_not_there_at_any_endpoint(api: Api, route: Route[Any], visibility: str):
    thread = await api.create(user("ann", team="core"), visibility=visibility, messages=MESSAGE["messages"])
    for stranger in (
        BOB,
        user("ann", issuer="https://other.test"),
        user("eve", team="core", issuer="https://other.test"),
    ):
        body = BODIES.get(route.operation)
        theirs = await api(route.method, filled(route, thread["id"]), body, stranger)
        assert theirs.status == 404, stranger
        if route.operation != "put_thread":  # which would create the absent one
            absent = await api(route.method, filled(route), body, stranger)
            assert {**theirs.json, "trace_id": ""} == {**absent.json, "trace_id": ""}


@of_a_thread
@pytest.mark.parametrize(
    "thread_id",
    [
        "x",
        "1",
        "0190a7c26a3e7cc0b1a55f0a2f6d3aff",
        "%7B0190a7c2-6a3e-7cc0-b1a5-5f0a2f6d3aff%7D",
        "claims%2Fa0",
        "..%2f",
    ],
)
async def test_what_is_no_uuid_is_no_thread(api: Api, route: Route[Any], thread_id: str):
    answer = await api(route.method, filled(route, thread_id), BODIES.get(route.operation))
    assert answer.status == 404


async def test_internal_threads_are_not_there(api: Api):
    for path in ("/api/threads/claims/a0", "/t/claims/a0", "/api/threads/claims%2Fa0/events"):
        assert (await api("GET", path)).status == 404


# ---------------------------------------------------------------- bad input


@with_body
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "invalid-field"),
        (b"{", "malformed-json"),
        (b'{"title":"\xff"}', "malformed-json"),
        (b'{"title":"\\ud800"}', "malformed-json"),
        (b'{"metadata":{"x":NaN}}', "malformed-json"),
        (b"[]", "invalid-field"),
        (b"5", "invalid-field"),
        (b"[" * 200_000, "malformed-json"),
        (b'{"x":' * 300 + b"1" + b"}" * 300, "invalid-field"),
    ],
    ids=range(9),
)
async def test_a_malformed_body_is_a_400_that_names_the_body(api: Api, route: Route[Any], data: bytes, kind: str):
    thread = await api.create()
    before = len(api.store.writes)
    answer = await api(route.method, filled(route, thread["id"]), data=data, headers=JSON)
    assert (answer.status, answer.json["type"].rsplit("/")[-1], answer.json["field"]) == (400, kind, "body")
    assert len(api.store.writes) == before


@with_body
async def test_a_body_over_the_limit_is_a_413_that_names_body_and_limit(api: Api, route: Route[Any]):
    thread = await api.create()
    huge = b'{"title":"' + b"x" * (20 * 1024 * 1024) + b'"}'

    async def chunks():
        for start in range(0, len(huge), 1 << 20):
            yield huge[start : start + (1 << 20)]

    zipped = {"Content-Encoding": "gzip"} | JSON
    for data, headers in ((huge, JSON), (chunks(), JSON), (gzip.compress(huge), zipped)):
        answer = await api(route.method, filled(route, thread["id"]), data=data, headers=headers)
        assert (answer.status, answer.json["field"], answer.json["limit_bytes"]) == (413, "body", 16 * 1024 * 1024)
        assert "16 MiB" in answer.json["detail"]
    assert (await api("GET", f"/api/threads/{thread['id']}")).json["v"] == 1


async def test_a_compressed_body_is_read(api: Api):
    data = gzip.compress(json.dumps({"title": "zipped"}).encode())
    answer = await api("POST", "/api/threads", data=data, headers=JSON | {"Content-Encoding": "gzip"})
    assert (answer.status, answer.json["title"]) == (201, "zipped")


async def test_a_body_that_only_claims_to_be_compressed_is_a_400(api: Api):
    answer = await api("POST", "/api/threads", data=b"{}", headers=JSON | {"Content-Encoding": "gzip"})
    assert answer.status == 400


async def test_a_body_that_breaks_off_writes_nothing_and_breaks_nothing(api: Api, caplog: pytest.LogCaptureFixture):
    identity = "".join(f"{name}: {value}\r\n" for name, value in api.identity(ANN).items())
    for framing, part in (
        ("Content-Length: 1000", b'{"title":"half'),
        ("Transfer-Encoding: chunked", b"9\r\n{"),
    ):
        _, writer = await asyncio.open_connection(api.client.host, api.client.port)
        writer.write(f"POST /api/threads HTTP/1.1\r\nHost: x\r\n{identity}{framing}\r\n\r\n".encode() + part)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    assert (await api("GET", "/api/threads")).json["threads"] == []
    assert api.store.writes == []
    assert "Traceback" not in caplog.text


@with_body
@pytest.mark.parametrize(
    "media", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", "json", ""]
)
async def test_a_body_of_another_type_is_a_415(api: Api, route: Route[Any], media: str):
    answer = await api(route.method, filled(route), data=b"{}", headers={"Content-Type": media})
    assert (answer.status, answer.json["field"]) == (415, "Content-Type")


@pytest.mark.parametrize(
    "media", ["application/json", "Application/JSON; charset=UTF-8", "application/merge-patch+json", None]
)
async def test_json_by_any_of_its_names_is_taken(api: Api, media: str | None):
    thread = await api.create()
    path = f"/api/threads/{thread['id']}"
    if media is not None:
        assert (await api("PATCH", path, data=b'{"title":"x"}', headers={"Content-Type": media})).status == 200
        return
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    identity = "".join(f"{name}: {value}\r\n" for name, value in api.identity(ANN).items())
    writer.write(
        f"PATCH {path} HTTP/1.1\r\nHost: x\r\n{identity}Content-Length: 13\r\n\r\n".encode() + b'{"title":"x"}'
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=-1", "limit"),
        ("limit=1.5", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=%D9%A1", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("limit=1&limit=2", "limit"),
        ("scope=all", "scope"),
        ("archived=yes", "archived"),
        ("consistency=strong", "consistency"),
        ("cursor=nonsense", "cursor"),
        ("cursor=%ff%fe", "cursor"),
        ("cursor=" + "A" * 5_000, "cursor"),
        ("cursor=WzEsImEiLCJiIl0", "cursor"),
    ],
)
@pytest.mark.parametrize("path", ["/api/threads", "/api/threads/list", "/api/threads/search"])
async def test_a_bad_question_is_a_400_that_names_the_parameter(api: Api, path: str, query: str, field: str):
    await api.create(title="a")
    answer = await api("GET", f"{path}?{query}" + ("&q=a" if "search" in path else ""))
    assert (answer.status, answer.json["field"]) == (400, field)
    assert answer.json["detail"].startswith(f"{field}: ")


async def test_a_cursor_of_another_question_or_person_is_refused(api: Api):
    for n in range(3):
        await api.create(title=f"a{n}")
    cursor = (await api("GET", "/api/threads?limit=1")).json["next_cursor"]
    assert (await api("GET", f"/api/threads?limit=2&cursor={cursor}")).status == 200
    for query, actor in (("archived=any", ANN), ("scope=team", user("ann", team="core")), ("limit=1", BOB)):
        assert (await api("GET", f"/api/threads?{query}&cursor={cursor}", actor=actor)).status == 400


@pytest.mark.parametrize("query", ["", "q=", "q=%20%20", "q=!!!", "q=" + "x" * 1_001])
async def test_a_search_for_nothing_is_a_400_that_names_q(api: Api, query: str):
    answer = await api("GET", f"/api/threads/search?{query}")
    assert (answer.status, answer.json["field"]) == (400, "q")


@pytest.mark.parametrize("word", ['"', "'", "AND", "NEAR(", "*", "a* OR b", "title:x", ")(", "%00", "-", "é"])
async def test_no_search_text_is_taken_for_syntax(api: Api, word: str):
    await api.create(title="a b x é AND NEAR")
    assert (await api("GET", f"/api/threads/search?q=x {word}")).status == 200


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("after=", "after"),
        ("after=7", "after"),
        ("after=1.x", "after"),
        ("after=-1.2", "after"),
        ("after=1.2&after=1.3", "after"),
        ("consistency=eventual", "consistency"),
    ],
)
async def test_a_bad_page_is_a_400_that_names_the_parameter(api: Api, query: str, field: str):
    thread = await api.create()
    answer = await api("GET", f"/api/threads/{thread['id']}?{query}")
    assert (answer.status, answer.json["field"]) == (400, field)


async def test_a_cursor_into_replaced_entries_is_a_reset(api: Api):
    thread = await api.create(messages=MESSAGE["messages"])
    answer = await api("GET", f"/api/threads/{thread['id']}?after=0.2")
    assert (answer.status, answer.json["current_version"]) == (409, "1.2")


@pytest.mark.parametrize("value", ["7", '"1.2"', "1.2.3", "-1.2", "1.9999999999999999"])
async def test_a_bad_minimum_version_is_a_400_that_names_the_header(api: Api, value: str):
    thread = await api.create()
    answer = await api("GET", f"/api/threads/{thread['id']}", headers={"X-Sync-Min-Version": value})
    assert (answer.status, answer.json["field"]) == (400, "X-Sync-Min-Version")


async def test_unserved_paths_and_methods_are_problems(api: Api):
    missing = await api("GET", "/api/nothing")
    assert (missing.status, missing.headers["Content-Type"].split(";")[0]) == (404, "application/problem+json")
    wrong = await api("POST", f"/api/threads/{ABSENT}", {})
    assert wrong.status == 405
    assert set(re.split(r",\s*", wrong.headers["Allow"])) == {"DELETE", "GET", "HEAD", "PATCH", "PUT"}
    # Names beside an id are no ids.
    for method, name, allowed in (("POST", "search", {"GET", "HEAD"}), ("PUT", "list", {"GET", "HEAD"})):
        wrong = await api(method, f"/api/threads/{name}", {})
        assert (wrong.status, set(re.split(r",\s*", wrong.headers["Allow"]))) == (405, allowed)
    assert (await api("DELETE", "/api/threads/events")).status == 405


async def test_streams_have_no_head(api: Api):
    assert (await api("HEAD", "/api/threads/events")).status in (404, 405)


# ---------------------------------------------------------------- errors of the store


def every(kind: type[StoreError]) -> list[type[StoreError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in every(below))]


EXPECTED = {
    base.ThreadNotFound: (404, False),
    base.ThreadDeleted: (410, False),
    base.ThreadExists: (409, False),
    base.NotAllowed: (403, False),
    base.StaleVersion: (412, False),
    base.EntryConflict: (409, False),
    base.KeyReused: (422, False),
    base.ThreadFull: (409, False),
    base.ThreadDamaged: (503, True),
    base.NotHolder: (503, True),
    base.Fenced: (503, True),
    base.Recovering: (503, True),
    base.BadCursor: (400, False),
    base.BadQuery: (400, False),
    base.Moved: (409, False),
    base.PositionLost: (409, False),
    base.StoreBusy: (503, True),
    base.StoreFull: (507, True),
    base.StoreFailed: (504, True),
    base.Unavailable: (503, True),
    base.Behind: (503, True),
    base.OutcomeUnknown: (504, True),
}
ARGUMENTS: dict[type, tuple[Any, ...]] = {
    base.StaleVersion: (Version(1, 2),),
    base.Moved: (Version(1, 2),),
    base.PositionLost: (base.Position("i", 3),),
    base.EntryConflict: ("m",),
    base.NotHolder: (replication.GroupRow("g", 1, "h", 1),),
    base.Fenced: (2,),
}


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_each_store_error_is_one_problem(kind: type[StoreError]):
    problem = translate(kind(*ARGUMENTS.get(kind, ("because",))))
    assert problem is not None
    assert (problem.status, problem.retryable) == EXPECTED[kind]
    if problem.status == 503:
        assert int(problem.headers["Retry-After"]) >= 1
    assert problem.detail.endswith(".") or problem.status == 400


def test_no_store_error_is_forgotten():
    ours = {kind for kind in every(StoreError)[1:] if kind.__module__ == base.__name__}
    assert ours == set(EXPECTED)


def test_what_is_not_the_stores_is_not_translated():
    assert translate(ValueError("x")) is None
    assert translate(web.HTTPNotFound()) is None


@pytest.mark.parametrize(
    ("error", "status"), [(base.StoreFull("full"), 507), (base.StoreFailed("?"), 504), (base.StoreBusy("busy"), 503)]
)
async def test_a_store_that_fails_is_a_clear_answer(
    api: Api, monkeypatch: pytest.MonkeyPatch, error: StoreError, status: int
):
    async def failing(write: Any) -> Any:
        raise error

    monkeypatch.setattr(api.store, "write", failing)
    answer = await api("POST", "/api/threads", {})
    assert (answer.status, answer.json["retryable"]) == (status, True)
    assert answer.json["trace_id"]


async def test_put_answers_what_it_wrote_when_the_thread_can_not_be_read_back(
    api: Api, monkeypatch: pytest.MonkeyPatch
):
    thread = await api.create()

    async def failing(*args: Any, **more: Any) -> Any:
        raise base.Unavailable("away")

    monkeypatch.setattr(api.store, "read", failing)
    answer = await api("PUT", f"/api/threads/{thread['id']}", {"title": "x"})
    assert (answer.status, answer.json["title"], answer.headers["X-Sync-Version"]) == (200, "x", "1.2")
