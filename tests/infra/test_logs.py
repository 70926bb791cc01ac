import io
import logging
from collections.abc import Iterator

import orjson
import pytest
from aiohttp.http_exceptions import BadStatusLine

from infra.logs import configure
from infra.trace import Trace, current_trace

log = logging.getLogger("weft.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_the_process_the_fields_and_the_current_trace() -> None:
    stream = io.StringIO()
    configure("info", "us-east", "region", stream=stream)
    trace = Trace.new()
    token = current_trace.set(trace)
    log.info("sent %d", 3, extra={"fields": {"target": "eu-west", "threads": 3}})
    current_trace.reset(token)
    (line,) = lines(stream)
    assert str(line.pop("ts")).endswith("Z")
    assert line == {
        "level": "info",
        "logger": "weft.test",
        "msg": "sent 3",
        "trace_id": trace.trace_id,
        "region": "us-east",
        "component": "region",
        "target": "eu-west",
        "threads": 3,
    }


def test_lines_under_the_level_are_not_written() -> None:
    stream = io.StringIO()
    configure("warning", stream=stream)
    log.info("quiet")
    log.warning("loud")
    (line,) = lines(stream)
    assert line["msg"] == "loud"
    assert not {"trace_id", "region", "component"} & line.keys()


def test_the_last_configuration_wins_and_lines_are_not_doubled() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(stream=first)
    configure(stream=second)
    log.info("once")
    assert (len(lines(first)), len(lines(second))) == (0, 1)


def test_an_exception_stays_on_its_one_line() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    try:
        raise RuntimeError("broken\nin two")
    except RuntimeError:
        log.exception("failed")
    (line,) = lines(stream)
    assert "RuntimeError: broken\nin two" in str(line["exception"])


def test_a_field_never_replaces_a_standard_member() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    log.info("real", extra={"fields": {"msg": "forged", "level": "forged"}})
    assert (lines(stream)[0]["msg"], lines(stream)[0]["level"]) == ("real", "info")


@pytest.mark.parametrize("value", ["\ud800", 1 << 70, object(), {1: {2}}, b"\xff", float("nan")])
def test_a_value_that_json_cannot_hold_does_not_lose_the_line(value: object) -> None:
    stream = io.StringIO()
    configure(stream=stream)
    log.info("kept", extra={"fields": {"value": value}})
    assert lines(stream)[0]["msg"] == "kept"


def test_what_a_client_did_wrong_is_not_our_error() -> None:
    stream = io.StringIO()
    configure(stream=stream)
    server = logging.getLogger("aiohttp.server")
    for error in (ConnectionResetError("gone"), BadStatusLine("GARBAGE"), RuntimeError("ours")):
        server.error("Error handling request", exc_info=error)
    (line,) = lines(stream)
    assert "ours" in str(line["exception"])


def test_a_terminal_gets_a_readable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    configure(component="edge", stream=stream)
    log.warning("slow", extra={"fields": {"ms": 12}})
    assert "warning edge weft.test: slow  ms=12" in stream.getvalue()
    assert "\x1b[33m" in stream.getvalue()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    configure(stream=stream)
    log.error("plain")
    assert "\x1b" not in stream.getvalue()
