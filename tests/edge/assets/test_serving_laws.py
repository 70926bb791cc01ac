"""Whatever is asked for and however, a client that follows RFC 9110 ends up with exactly the bytes that were built."""

from __future__ import annotations

import email.parser
import email.policy
import os
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.assets import encode as encoding
from edge.assets.build import Result
from edge.assets.serve import FILE_BYTES_MAX
from tests.edge.assets.conftest import SITE, Workshop
from tests.edge.conftest import RunningEdge, StartEdge

MORE = {
    "empty.txt": b"",
    "one.txt": b"x",
    "random.bin": os.urandom(3000),
    "large.png": os.urandom(FILE_BYTES_MAX + 1),
    "large.txt": b"".join(b"%d %d\n" % (number, number * number) for number in range(40_000)),
}
PATHS = sorted({**SITE, **MORE})
CODINGS = ("br", "zstd", "gzip", "identity", "*", "deflate")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, Result]:
    workshop = Workshop(tmp_path_factory.mktemp("built"))
    return workshop, workshop.build({**SITE, **MORE})


@pytest.fixture
async def edge(built: tuple[Workshop, Result], start_edge: StartEdge) -> RunningEdge:
    return await start_edge(origins=("http://127.0.0.1:9",), issuers=(), assets=built[0].out)


accepted = st.one_of(
    st.none(),
    st.lists(
        st.tuples(st.sampled_from(CODINGS), st.sampled_from(["", ";q=0", ";q=0.001", "; q=0.5", ";q=1"])), max_size=5
    ).map(lambda items: ", ".join(coding + weight for coding, weight in items)),
)
position = st.one_of(st.integers(0, 40), st.integers(0, 600_000))
span = st.one_of(
    st.tuples(position, position).map(lambda pair: f"{min(pair)}-{max(pair)}"),
    position.map(lambda first: f"{first}-"),
    position.map(lambda last: f"-{last}"),
)
ranges = st.one_of(st.none(), st.lists(span, min_size=1, max_size=5).map(lambda spans: "bytes=" + ",".join(spans)))
condition = st.sampled_from(["", "same", "other", "weak", "list"])


@given(
    path=st.sampled_from(PATHS),
    by_hash=st.booleans(),
    accepted=accepted,
    asked=ranges,
    if_range=condition,
    if_none_match=condition,
    method=st.sampled_from(["GET", "GET", "GET", "HEAD"]),
)
@settings(
    max_examples=int(os.environ.get("WEFT_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_what_a_client_puts_together_is_what_was_built(
    built, edge, path, by_hash, accepted, asked, if_range, if_none_match, method
):
    workshop, result = built
    asset = result.manifest.files[path]
    url = "/cdn/" + (asset.file if by_hash else path)
    headers = {} if accepted is None else {"Accept-Encoding": accepted}
    probe = await ask(edge, url, "HEAD", headers)
    if probe.status == 406:
        assert takes_nothing(accepted, asset.encodings)
        return
    coding = probe.headers.get("Content-Encoding", "identity")
    assert coding == "identity" or coding in asset.encodings
    suffix = encoding.SUFFIXES.get(coding, "")
    expected = (workshop.out / (asset.file + suffix)).read_bytes()
    tag = probe.headers["ETag"]
    if asked is not None:
        headers["Range"] = asked
        if if_range:
            headers["If-Range"] = spelt(if_range, tag)
    if if_none_match:
        headers["If-None-Match"] = spelt(if_none_match, tag)
    answer = await ask(edge, url, method, headers)
    body = await answer.read()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers.get("Vary") == ("Accept-Encoding" if asset.encodings else None)
    if if_none_match in ("same", "weak", "list"):
        assert (answer.status, body) == (304, b"")
        assert answer.headers["ETag"] == tag
        return
    if answer.status == 416:
        assert asked is not None and answer.headers["Content-Range"] == f"bytes */{len(expected)}"
        assert not any(wanted(item, len(expected)) for item in asked.removeprefix("bytes=").split(","))
        return
    assert answer.headers["ETag"] == tag
    assert answer.headers.get("Content-Encoding", "identity") == coding
    whole = asked is None or method == "HEAD" or if_range in ("other", "weak", "list")
    if whole:
        assert answer.status == 200
    if method == "HEAD":
        assert (body, answer.headers["Content-Length"]) == (b"", str(len(expected)))
    elif answer.status == 200:
        assert body == expected
        decoded = body if coding == "identity" else encoding.decode(body, coding)
        assert decoded == (workshop.out / asset.file).read_bytes()
    else:
        assert answer.status == 206
        assert asked is not None
        spans = [wanted(item, len(expected)) for item in asked.removeprefix("bytes=").split(",")]
        assert parts(answer, body) == [
            (f"bytes {start}-{stop - 1}/{len(expected)}", expected[start:stop]) for start, stop in filter(None, spans)
        ]


async def ask(edge: RunningEdge, url: str, method: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
    skipped = ("Accept-Encoding", "Accept", "User-Agent")
    options: dict[str, Any] = {"token": "", "skip_auto_headers": skipped}
    return await edge.ask(method, url, headers=headers, **options)


def spelt(condition: str, tag: str) -> str:
    return {"same": tag, "other": '"other"', "weak": "W/" + tag, "list": f'"a", {tag} ,"b"'}[condition]


def wanted(spec: str, size: int) -> tuple[int, int] | None:
    """From and to of one range, as RFC 9110 §14.1.2 has it; None if nothing of it is there."""
    first, _, last = spec.partition("-")
    if not first:
        return (max(0, size - int(last)), size) if int(last) and size else None
    return (int(first), min(size, int(last) + 1 if last else size)) if int(first) < size else None


def takes_nothing(accepted: str | None, encodings: dict[str, object]) -> bool:
    """Whether `accepted` refuses identity and names none of `encodings`, read the slow way."""
    weights: dict[str, float] = {}
    for item in (accepted or "").split(","):
        coding, _, weight = item.strip().partition(";")
        if coding:
            weights.setdefault(coding, float(weight.strip().removeprefix("q=")) if weight else 1.0)
    identity = weights.get("identity", weights.get("*", 1.0))
    return not identity and not any(weights.get(coding, weights.get("*", 0.0)) for coding in encodings)


def parts(answer: aiohttp.ClientResponse, body: bytes) -> list[tuple[str, bytes]]:
    """What a 206 holds: (Content-Range, bytes) of each part."""
    assert answer.headers["Content-Length"] == str(len(body))
    if "Content-Range" in answer.headers:
        return [(answer.headers["Content-Range"], body)]
    boundary = answer.headers["Content-Type"].partition("boundary=")[2].encode()
    assert body.endswith(b"\r\n--" + boundary + b"--\r\n")
    found: list[tuple[str, bytes]] = []
    for piece in body.split(b"\r\n--" + boundary)[1:-1]:
        head, _, data = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + b"\r\n\r\n")
        found.append((str(fields["Content-Range"]), data))
    return found
