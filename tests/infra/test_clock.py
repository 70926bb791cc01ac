import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.clock import SYSTEM_CLOCK, parse_rfc3339, rfc3339

YEAR_1_US = -62_135_596_800_000_000
YEAR_10000_US = 253_402_300_800_000_000


def test_an_instant_has_milliseconds_and_finer_digits_only_when_they_are_not_zero() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(1_795_409_409_123_000) == "2026-11-23T04:50:09.123Z"
    assert rfc3339(1_795_409_409_123_004) == "2026-11-23T04:50:09.123004Z"
    assert rfc3339(-1) == "1969-12-31T23:59:59.999999Z"


@given(st.integers(YEAR_1_US, YEAR_10000_US - 1))
def test_text_and_back_is_the_same_instant(unix_us: int) -> None:
    assert parse_rfc3339(rfc3339(unix_us)) == unix_us


@given(st.integers(0, YEAR_10000_US - 1), st.integers(0, YEAR_10000_US - 1))
def test_text_of_whole_milliseconds_sorts_as_time_does(a: int, b: int) -> None:
    a, b = a - a % 1000, b - b % 1000
    assert (rfc3339(a) < rfc3339(b)) == (a < b)


@pytest.mark.parametrize("beyond", [YEAR_1_US - 1, YEAR_10000_US, 10**30, -(10**30)])
def test_an_instant_outside_the_years_1_to_9999_has_no_text(beyond: int) -> None:
    with pytest.raises(ValueError, match="outside the years"):
        rfc3339(beyond)


@pytest.mark.parametrize(
    ("text", "unix_us"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00z", 0),
        ("1970-01-01T00:00:00.5Z", 500_000),
        ("1970-01-01T00:00:00.1234567899999999999999Z", 123_456),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1969-12-31T18:30:00-05:30", 0),
        ("1970-01-01T00:00:00-00:00", 0),
        ("2016-12-31T23:59:60Z", 1_483_228_800_000_000),
        ("2016-12-31T23:59:60.75Z", 1_483_228_800_000_000),
        ("2024-02-29T00:00:00Z", 1_709_164_800_000_000),
    ],
)
def test_every_form_of_rfc_3339_is_read(text: str, unix_us: int) -> None:
    assert parse_rfc3339(text) == unix_us


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-23",
        "2026-11-23 04:50:09Z",
        "2026-11-23T04:50:09",
        "2026-11-23T04:50:09.Z",
        "2026-11-23T04:50:09+0100",
        "2026-11-23T04:50:09+24:00",
        "2026-11-23T04:50:09+01:60",
        "2026-11-23T24:00:00Z",
        "2026-11-23T04:50:61Z",
        "2026-02-29T04:50:09Z",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "２０２６-11-23T04:50:09Z",
        " 2026-11-23T04:50:09Z",
        "2026-11-23T04:50:09Z\n",
    ],
)
def test_what_is_not_a_date_time_is_a_value_error_that_quotes_it(text: str) -> None:
    with pytest.raises(ValueError, match="date-time"):
        parse_rfc3339(text)


def test_an_error_does_not_repeat_a_megabyte() -> None:
    with pytest.raises(ValueError) as caught:
        parse_rfc3339("9" * 1_000_000)
    assert len(str(caught.value)) < 200


async def test_the_system_clock_is_the_machines() -> None:
    before = SYSTEM_CLOCK.monotonic()
    await SYSTEM_CLOCK.sleep(0.01)
    assert SYSTEM_CLOCK.monotonic() - before >= 0.01
    assert abs(SYSTEM_CLOCK.time() - time.time()) < 1
