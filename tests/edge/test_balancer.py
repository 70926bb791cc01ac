"""Which origin takes a request."""

import pytest

from edge.balancer import EJECTED_S, FAILURES_MAX, Balancer
from tests.support.fakeclock import FakeClock


def test_the_origin_with_the_least_in_flight_is_picked():
    balancer = Balancer(["a", "b", "c"])
    picked = [balancer.pick() for _ in range(6)]
    assert sorted(origin.url for origin in picked) == ["a", "a", "b", "b", "c", "c"]
    for origin in picked:
        if origin.url == "b":
            origin.release(failed=False)
    assert [balancer.pick().url for _ in range(2)] == ["b", "b"]


def test_equals_take_turns():
    balancer = Balancer(["a", "b"])
    urls = []
    for _ in range(4):
        origin = balancer.pick()
        urls.append(origin.url)
        origin.release(failed=False)
    assert sorted(urls) == ["a", "a", "b", "b"]


def fail(balancer: Balancer, url: str) -> None:
    others = [origin for origin in (balancer.pick() for _ in range(len(balancer))) if origin.url != url]
    for _ in range(FAILURES_MAX):
        origin = balancer.pick(others)
        assert origin.url == url
        origin.release(failed=True)
    for origin in others:
        origin.release(failed=None)


def test_an_origin_that_keeps_failing_is_left_out_then_probed_by_one_request():
    clock = FakeClock()
    balancer = Balancer(["bad", "good"], clock=clock)
    fail(balancer, "bad")
    used = [balancer.pick() for _ in range(5)]
    assert {origin.url for origin in used} == {"good"}
    clock.step(EJECTED_S)
    probes = [origin for origin in (balancer.pick() for _ in range(3)) if origin.url == "bad"]
    assert len(probes) == 1
    probes[0].release(failed=False)
    assert balancer.pick().url == "bad"


def test_when_all_fail_one_is_asked_all_the_same():
    balancer = Balancer(["only"], clock=FakeClock())
    for _ in range(FAILURES_MAX):
        balancer.pick().release(failed=True)
    assert balancer.trouble() == "no origin answers: only"
    assert balancer.pick().url == "only"


def test_a_request_nobody_waited_for_says_nothing_about_the_origin():
    balancer = Balancer(["only"], clock=FakeClock())
    for _ in range(FAILURES_MAX - 1):
        balancer.pick().release(failed=True)
    balancer.pick().release(failed=None)
    balancer.pick().release(failed=True)
    assert balancer.trouble() is not None


def test_another_origin_is_picked_where_there_is_one():
    balancer = Balancer(["a", "b"])
    first = balancer.pick()
    assert balancer.pick([first]) is not first
    alone = Balancer(["a"])
    assert alone.pick([alone.pick()]).url == "a"


def test_a_balancer_without_origins_is_an_error():
    with pytest.raises(ValueError):
        Balancer([])
