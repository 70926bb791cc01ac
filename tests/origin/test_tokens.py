"""The token rule over random histories: what counts as seen, what has to be waited for, and what is a reset.

The model is the rule as it is written (PROTOCOL section 6), over plain lists of epochs: a token `e.v` says that
the caller has seen the entry that an epoch e put at place v.
"""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from origin.store.base import (
    Behind,
    Freshness,
    Moved,
)
from origin.store.queries import after_seq, check_freshness
from origin.thread import Row, Version

History = list[int]
"""The epoch of each entry of a log, never falling."""


def row_of(history: History) -> Row:
    starts: list[tuple[int, int]] = []
    for seq, epoch in enumerate(history, start=1):
        if not starts or starts[-1][0] != epoch:
            starts.append((epoch, seq))
    return Row(
        id="t", group="g", epoch=history[-1] if history else 0, v=len(history), head_hash=b"", epochs=tuple(starts),
        issuer="i", owner="o", team=None, visibility="private", title="", created_at="", last_activity="",
        activity_us=0, message_count=0, archived=False, external_id=None, relations=b"[]", metadata=b"{}", extra=b"{}",
    )  # fmt: skip


histories = st.lists(st.integers(1, 6), min_size=1, max_size=12).map(sorted)


def judged(row: Row, token: Version) -> str:
    """What a read and a cursor are told; the two never differ."""
    verdicts: list[str] = []
    for ask in (
        lambda: check_freshness(row, Freshness(min_version=token)),
        lambda: after_seq(row, str(token)),
    ):
        try:
            ask()
            verdicts.append("seen")
        except Behind:
            verdicts.append("behind")
        except Moved as moved:
            assert moved.version == row.version
            verdicts.append("moved")
    assert verdicts[0] == verdicts[1]
    return verdicts[0]


@given(histories, st.integers(0, 8), st.integers(1, 14))
@example([1, 1, 2], 1, 3)
@example([1, 1, 2], 2, 5)
@example([2], 1, 2)
def test_a_token_is_satisfied_by_the_very_entry_alone(history: History, epoch: int, v: int):
    verdict = judged(row_of(history), Version(epoch, v))
    here = history[v - 1] if v <= len(history) else None
    if here is not None:
        assert verdict == ("seen" if here == epoch else "moved" if here > epoch else "behind")
    else:
        # Absent. Epochs never fall along a log: behind an entry of a higher epoch none of `epoch` can come, so
        # waiting for it would be for ever.
        assert verdict == ("moved" if history[-1] > epoch else "behind")


@given(histories, st.integers(1, 14), st.data())
def test_what_was_seen_stays_seen_while_the_log_only_grows(history: History, grown: int, data: st.DataObject):
    """Monotonic reads: every place of a prefix is seen in the whole, and nothing of the whole is lost on the prefix."""
    more = data.draw(st.lists(st.integers(history[-1], 8), max_size=grown).map(sorted))
    whole = row_of(history + more)
    prefix = row_of(history)
    for v, epoch in enumerate(history + more, start=1):
        assert judged(whole, Version(epoch, v)) == "seen"
        assert judged(prefix, Version(epoch, v)) == ("seen" if v <= len(history) else "behind")


@given(histories, st.data())
def test_no_entry_that_a_failover_replaced_ever_counts_as_seen(history: History, data: st.DataObject):
    """A new holder keeps a prefix and goes on in an epoch of its own: of the rest, every token is a reset as soon as
    its place is taken or passed, and until then a wait, and never read as something it is not."""
    kept = data.draw(st.integers(0, len(history) - 1))
    epoch = history[-1] + 1
    tail = data.draw(st.integers(1, 14))
    replaced = row_of(history[:kept] + [epoch] * tail)
    for v, old in enumerate(history, start=1):
        assert judged(replaced, Version(old, v)) == ("seen" if v <= kept else "moved")
    cut = history[:kept]
    for v, old in enumerate(history[kept:], start=kept + 1):
        assert judged(row_of(cut), Version(old, v)) == "behind"


@given(histories, st.data())
def test_a_doomed_tail_of_a_higher_epoch_hides_nothing(history: History, data: st.DataObject):
    """A holder that nobody followed put entries of a higher epoch where the log that won has older ones."""
    kept = data.draw(st.integers(0, len(history) - 1))
    doomed = row_of(history[:kept] + [history[-1] + 1])
    for v, epoch in enumerate(history[kept:], start=kept + 1):
        assert judged(doomed, Version(epoch, v)) == "moved"
    # And the other way round: who read from it waits at the log that won, until its next holder takes the place.
    won = row_of(history)
    assert judged(won, Version(history[-1] + 1, kept + 1)) == "behind"


@given(histories)
def test_the_start_is_always_seen(history: History):
    for start in ("0", "0.0", "1.0", "9.0"):
        assert after_seq(row_of(history), start) == 0
