"""A proxy before an AWS that harms chosen calls: throttles, fails, delays, loses answers, cuts batches short.

Promise: it knows calls by their names in a policy (`dynamodb:TransactWriteItems`, `s3:PutObject`, `sqs:SendMessage`)
for DynamoDB, S3, SQS, KMS and STS alike; a fault strikes the calls it matches in their order, so many times; what is
not struck passes unaltered, and every call is counted. It runs in a thread of its own, so that tests of either kind
and processes beside them can use it. Left to others: the AWS behind it.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from tests.support.ports import free_port

Harm = Literal["throttle", "error", "unsent", "lost", "delay", "late", "hold", "hold-answer", "conflict", "partial"]
"""What becomes of a call: throttled (not carried out); a 5xx (not carried out); the connection cut before it is passed
on, or after it was carried out; passed on, or answered, `seconds` later; held until `release` before it is passed on,
or with the answer ready; a transaction cancelled by another; a batch carried out by half, the rest unprocessed."""

BODY_BYTES_MAX: Final = 64 * 1024 * 1024
_HOP: Final = frozenset({"connection", "content-length", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"})
_SCOPE: Final = re.compile(r"Credential=[^/]+/\d+/([^/]+)/([^/]+)/aws4_request")
_THROTTLED: Final = {"dynamodb": "ProvisionedThroughputExceededException", "sqs": "RequestThrottled"}


@dataclass(eq=False)
class Fault:
    """One harm, to calls whose name matches `calls` (a glob) and whose body contains `body`."""

    calls: str
    harm: Harm
    times: int | None = 1
    """None: until it is lifted."""
    after: int = 0
    """So many matching calls pass first."""
    body: bytes = b""
    seconds: float = 0.0
    struck: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    """Set when a call was struck (held: when it is being held)."""
    _released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let held calls go on, and strike no more."""
        self.times = self.struck
        self._released.set()

    async def _wait(self) -> None:
        self.reached.set()
        while not self._released.is_set():
            await asyncio.sleep(0.005)

    def _strikes(self, call: str, body: bytes) -> bool:
        if not fnmatchcase(call, self.calls) or self.body not in body:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None and self.struck >= self.times:
            return False
        self.struck += 1
        return True


class AwsFaults:
    """The proxy, seen from a test. `url` is its address."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        """Every call that came, in order."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def harm(self, calls: str, harm: Harm, **options: Any) -> Fault:
        fault = Fault(calls, harm, **options)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            fault.release()

    def _fault_for(self, call: str, body: bytes) -> Fault | None:
        with self._lock:
            self.calls[call] += 1
            self.log.append(call)
            return next((fault for fault in self._faults if fault._strikes(call, body)), None)

    # ------------------------------------------------------------ the server

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        service, action = called(request)
        fault = self._fault_for(f"{service}:{action}", body)
        harm = fault.harm if fault is not None else None
        if fault is not None and harm not in ("hold", "hold-answer"):
            fault.reached.set()
        match harm:
            case "throttle":
                return _refusal(service, 503 if service == "s3" else 400, _THROTTLED.get(service, "SlowDown"))
            case "error":
                return _refusal(service, 500, "InternalError" if service == "s3" else "InternalServerError")
            case "conflict":
                return _cancelled(body)
            case "unsent":
                return self._cut(request)
            case "delay":
                assert fault is not None
                await asyncio.sleep(fault.seconds)
            case "hold":
                assert fault is not None
                await fault._wait()
            case "partial":
                return await self._partial(request, action, body)
            case _:
                pass
        try:
            answer = await self._pass_on(request, body)
        except aiohttp.ClientError:
            return self._cut(request)  # as the AWS behind it did
        match harm:
            case "lost":
                return self._cut(request)
            case "late":
                assert fault is not None
                await asyncio.sleep(fault.seconds)
            case "hold-answer":
                assert fault is not None
                await fault._wait()
            case _:
                pass
        return answer

    def _cut(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _pass_on(self, request: web.Request, body: bytes) -> web.Response:
        headers = CIMultiDict((k, v) for k, v in request.headers.items() if k.lower() not in _HOP)
        url = URL(self.target + request.raw_path, encoded=True)
        async with self._http.request(
            request.method, url, headers=headers, data=body or None, allow_redirects=False
        ) as answer:
            content = await answer.read()
            back = CIMultiDict((k, v) for k, v in answer.headers.items() if k.lower() not in _HOP)
            if request.method == "HEAD":
                back["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(status=answer.status, body=content or None, headers=back)

    async def _partial(self, request: web.Request, action: str, body: bytes) -> web.Response:
        """A batch of which only the first half is carried out, as when it is throttled in the middle."""
        asked: dict[str, Any] = json.loads(body)
        left: dict[str, Any] = {}
        for table, items in asked["RequestItems"].items():
            if action == "BatchWriteItem":
                keep = (len(items) + 1) // 2
                asked["RequestItems"][table], left[table] = items[:keep], items[keep:]
            else:
                keys = items["Keys"]
                keep = (len(keys) + 1) // 2
                left[table] = {**items, "Keys": keys[keep:]}
                items["Keys"] = keys[:keep]
        left = {table: rest for table, rest in left.items() if (rest if isinstance(rest, list) else rest["Keys"])}
        shortened = json.dumps(asked).encode()
        answer = await self._pass_on(request, shortened)  # the emulators do not look at signatures
        assert isinstance(answer.body, bytes)
        said = json.loads(answer.body)
        said["UnprocessedItems" if action == "BatchWriteItem" else "UnprocessedKeys"] = left
        return web.json_response(said, status=answer.status, content_type="application/x-amz-json-1.0")

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._http:
            app = web.Application(client_max_size=BODY_BYTES_MAX)
            app.router.add_route("*", "/{path:.*}", self.handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            started.set()
            await stop.wait()
            await runner.cleanup()


@contextmanager
def aws_faults(target: str) -> Iterator[AwsFaults]:
    """A proxy before the AWS at `target`, for as long as the block."""
    faults = AwsFaults(target)
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(faults.serve(started, stop),), daemon=True)
    thread.start()
    try:
        assert started.wait(30), "the proxy did not start"
        yield faults
    finally:
        faults.heal()
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def called(request: web.BaseRequest) -> tuple[str, str]:
    """(service, action) of a call, by what the protocols of AWS put where."""
    scope = _SCOPE.search(request.headers.get("Authorization", ""))
    service = scope[2] if scope else "s3"
    target = request.headers.get("X-Amz-Target", "")
    if target:
        return service, target.rpartition(".")[2]
    if service == "s3":
        return service, _s3_action(request)
    return service, dict(parse_qsl(urlsplit(request.raw_path).query)).get("Action", request.method)


def _s3_action(request: web.BaseRequest) -> str:
    parts = urlsplit(request.raw_path)
    keyed = "/" in parts.path.lstrip("/").rstrip("/")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if keyed:
        if request.method == "PUT":
            return "CopyObject" if "x-amz-copy-source" in request.headers else "PutObject"
        return {"GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}.get(request.method, "PostObject")
    if request.method == "POST" and "delete" in query:
        return "DeleteObjects"
    if request.method == "GET" and "list-type" in query:
        return "ListObjectsV2"
    if request.method == "GET" and "versions" in query:
        return "ListObjectVersions"
    verb = {"GET": "Get", "PUT": "Put", "HEAD": "Head", "DELETE": "Delete"}.get(request.method, request.method)
    what = "".join(word.capitalize() for name in query for word in re.split("(?=[A-Z])", name))
    return f"{verb}Bucket{what}"


def _refusal(service: str, status: int, code: str) -> web.Response:
    if service == "s3":
        xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the test</Message></Error>"
        return web.Response(status=status, text=xml, content_type="application/xml")
    said = json.dumps({"__type": f"com.amazonaws.{service}#{code}", "message": "by the test"})
    return web.Response(status=status, text=said, content_type="application/x-amz-json-1.0")


def _cancelled(body: bytes) -> web.Response:
    count = len(json.loads(body)["TransactItems"])
    reasons = [{"Code": "TransactionConflict", "Message": "by the test"}] + [{"Code": "None"}] * (count - 1)
    said = {
        "__type": "com.amazonaws.dynamodb.v20120810#TransactionCanceledException",
        "Message": f"Transaction cancelled, please refer cancellation reasons for specific reasons {reasons}",
        "CancellationReasons": reasons,
    }
    return web.Response(status=400, text=json.dumps(said), content_type="application/x-amz-json-1.0")
