"""What a path may mean, and who may ask for it."""

import pytest

from edge.paths import Access, PathRules, readings

RULES = PathRules(("/site", "/Files/"))
EVERYTHING = PathRules(("/",))


@pytest.mark.parametrize(
    "path",
    [
        "/peer", "/peer/", "/peer/feed", "//peer/feed", "/%70eer/feed", "/p%65er", "/%2570eer/feed", "/PEER/feed",
        "/peer/../api/threads", "/api/../peer/feed", "/./peer", "/x/%2e%2e/peer", "/x/..%2fpeer/feed", "/\\peer/feed",
        "/%5cpeer", "/peer;v=1/feed", "/;x/peer/feed", "/..;/peer", "/%2fpeer", "/site/%252e%252e/peer", "/../peer",
        "/%252525252570eer",
    ],
)  # fmt: skip
def test_nothing_that_may_mean_peer_is_ever_served(path):
    assert RULES.access(path) is Access.NEVER
    assert EVERYTHING.access(path) is Access.NEVER


@pytest.mark.parametrize(
    "path",
    [
        "/api", "/api/threads", "//api/threads", "/%61pi/threads", "/site/../api/threads", "/site/..%2Fapi/threads",
        "/v1/models", "/V1/models", "/API/threads", "/site/%2e%2e/v1/models", "/api;x/threads", "/t/%2e./api/threads",
        "/api/../site",
    ],
)  # fmt: skip
def test_nothing_that_may_mean_the_api_is_ever_open(path):
    assert RULES.access(path) is Access.PROTECTED
    assert EVERYTHING.access(path) is Access.PROTECTED


@pytest.mark.parametrize(
    "path",
    ["/", "/openapi.json", "/docs", "/docs/", "/docs/app.js", "/t/abc", "/cdn/app.123.js", "/site", "/site/a/b.css",
     "/Files/x", "/site/a%20b", "/site/./a"],
)  # fmt: skip
def test_what_needs_no_token(path):
    assert RULES.access(path) is Access.OPEN


@pytest.mark.parametrize(
    "path", ["/other", "/sites", "/docstring", "/files/x", "/site/../other", "/openapi.jsonx", "/site/%2e%2e/other"]
)
def test_what_needs_one(path):
    assert RULES.access(path) is Access.PROTECTED


def test_with_everything_public_everything_else_is_open():
    assert EVERYTHING.access("/other/../thing%2f") is Access.OPEN


def test_a_plain_path_has_one_reading():
    assert readings("/api/threads/1.5/x") == {("api", "threads", "1.5", "x")}


def test_a_path_that_never_ends_decoding_has_none():
    assert readings("/%2525252541") == frozenset()
