"""What the holder does with entries that were acknowledged in an older epoch: every rule of PROTOCOL section 5."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from origin.access import INTERNAL
from origin.store.base import (
    Draft,
    Fenced,
    NotAllowed,
    NotHolder,
    ThreadNotFound,
    Version,
    Write,
    Written,
)
from origin.store.replication import (
    Promise,
    Resubmit,
    Resubmitted,
)
from origin.thread import CLAIMS_PREFIX, ClaimBody, Entry, EntryMeta, PatchBody, encode
from tests.contract.conftest import ENGINES, Engine, OpenEngine
from tests.support.builders import (
    REGIONS,
    append,
    bodies,
    change,
    commit_one,
    copy_threads,
    create,
    delete,
    key,
    message,
    messages,
    patch,
    user,
)
from tests.support.elections import check_logs, elect, ids_of, log_of, send_all, submit_saved

pytestmark = pytest.mark.parametrize("open_engine", ENGINES, indirect=True)

T = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
HERE, PEER, THIRD = REGIONS
ANN = user("ann", "red")


async def part_ways(open_engine: OpenEngine, thread_id: str = T, **fields: Any) -> tuple[Engine, Engine]:
    """The old holder and the new one of epoch 2, with the same log of a thread: its creation and m1."""
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(thread_id, ANN, messages=messages(1), **fields))
    await copy_threads(old, new, thread_id)
    await elect(new, PEER, 2)
    return old, new


async def tail_of(old: Engine, after: int = 2, thread_id: str = T) -> tuple[Entry, ...]:
    return (await log_of(old, thread_id))[after:]


async def resubmit(new: Engine, *entries: Entry, thread_id: str = T) -> Resubmitted:
    outcome = await commit_one(new, Resubmit(HERE, thread_id, HERE, entries))
    assert isinstance(outcome, Resubmitted), outcome
    await check_logs(new, thread_id)
    return outcome


def meta_of(entry: Entry | None) -> EntryMeta:
    assert entry is not None
    return msgspec.json.decode(entry.meta, type=EntryMeta)


async def visible_title(engine: Engine) -> tuple[str, str, bool]:
    row = await engine.row(T)
    assert row is not None
    return row.title, row.visibility, row.archived


# ---------------------------------------------------------------- messages


async def test_messages_append_behind_the_new_epochs_with_their_ids_and_bodies(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a", "one"), message("b", "two"), actor=ANN))
    await commit_one(new, append(T, message("c"), actor=ANN))
    tail = await tail_of(old)
    outcome = await resubmit(new, *tail)
    assert outcome.fates == (("a", "appended"), ("b", "appended"))
    assert await ids_of(new, T) == ["weft:create", "m1", "weft:term:2", "c", "a", "b"]
    for before in tail:
        after = await new.find(T, before.id)
        assert after is not None
        assert (after.kind, after.body, after.epoch) == (before.kind, before.body, 2)
        assert meta_of(after).moved_from == f"{before.epoch}.{before.seq}"
        assert (meta_of(after).subject, meta_of(after).at) == (meta_of(before).subject, meta_of(before).at)
    written = outcome.written
    assert (written.base_v, written.row.v, written.version) == (4, 6, Version(2, 6))
    assert [entry.id for entry in written.entries] == ["a", "b"]
    assert dict(await new.unconfirmed(T)) == {HERE: 2, THIRD: 2}


async def test_a_term_mark_goes_before_the_first_that_is_submitted_again(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=ANN))
    outcome = await resubmit(new, *await tail_of(old))
    assert [entry.id for entry in outcome.written.entries] == ["weft:term:2", "a"]


async def test_what_is_there_already_is_not_doubled(open_engine: OpenEngine) -> None:
    """The client retried at the new holder, or the answer to the first submission was lost."""
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), message("b"), actor=ANN))
    await commit_one(new, append(T, message("a"), actor=ANN))
    tail = await tail_of(old)
    assert (await resubmit(new, *tail)).fates == (("a", "present"), ("b", "appended"))
    again = await resubmit(new, *tail)
    assert again.fates == (("a", "present"), ("b", "present"))
    assert (again.written.entries, again.written.base_v) == ((), 5)
    assert (await resubmit(new, *tail, *tail)).written.entries == ()
    assert await ids_of(new, T) == ["weft:create", "m1", "weft:term:2", "a", "b"]


async def test_an_entry_given_twice_in_one_submission_is_appended_once(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=ANN))
    [entry] = await tail_of(old)
    assert (await resubmit(new, entry, entry)).fates == (("a", "appended"), ("a", "present"))


async def test_an_id_that_became_anothers_is_kept_under_a_derived_one(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a", "old"), actor=ANN))
    await commit_one(new, append(T, message("a", "new"), actor=ANN))
    [entry] = await tail_of(old)
    outcome = await resubmit(new, entry)
    assert outcome.fates == (("a", "appended"),)
    [_, first, second] = bodies((await new.read(T, ANN)).messages)
    assert (first["id"], first["content"]) == ("a", "new")
    assert second["id"].startswith("a~")
    assert (second["conflict_of"], second["content"]) == ("a", "old")
    assert (await new.find(T, second["id"])) is not None
    assert (await resubmit(new, entry)).fates == (("a", "present"),), "its retry finds the derived one"
    assert len(await log_of(new, T)) == 5


async def test_a_derived_id_is_one_a_message_may_have(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    long = "x" * 200
    await commit_one(old, append(T, message(long, "old"), actor=ANN))
    await commit_one(new, append(T, message(long, "new"), actor=ANN))
    outcome = await resubmit(new, *await tail_of(old))
    assert len(outcome.written.entries[-1].id) <= 200
    assert json.loads(outcome.written.entries[-1].body)["conflict_of"] == long


# ---------------------------------------------------------------- patches


async def test_a_patch_sets_only_what_no_later_epoch_touched(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, change(T, patch("p", title="old", archived=True, metadata={"by": "old"}), ANN))
    await commit_one(new, change(T, patch("q", title="new"), ANN))
    assert (await resubmit(new, *await tail_of(old))).fates == (("weft:patch:p", "appended"),)
    assert await visible_title(new) == ("new", "private", True)
    row = await new.row(T)
    assert row is not None
    assert json.loads(row.metadata) == {"by": "old"}
    entry = await new.find(T, "weft:patch:p")
    assert entry is not None
    assert msgspec.json.decode(entry.body, type=PatchBody).title is msgspec.UNSET


async def test_a_patch_of_which_nothing_is_left_comes_back_empty(open_engine: OpenEngine) -> None:
    """Whoever saved it waits for its id."""
    old, new = await part_ways(open_engine)
    await commit_one(old, change(T, patch("p", title="old"), ANN))
    await commit_one(new, change(T, patch("q", title="new"), ANN))
    await resubmit(new, *await tail_of(old))
    entry = await new.find(T, "weft:patch:p")
    assert entry is not None
    assert entry.body == b"{}"


@pytest.mark.parametrize("apart", [False, True])
async def test_patches_of_one_tail_keep_their_order(open_engine: OpenEngine, apart: bool) -> None:
    """The first, an entry of the new epoch by now, must not take from the second what that set after it."""
    old, new = await part_ways(open_engine)
    await commit_one(old, change(T, patch("p", title="first", archived=True), ANN))
    await commit_one(old, change(T, patch("q", title="second"), ANN))
    tail = await tail_of(old)
    for entries in [[tail[0]], [tail[1]]] if apart else [tail]:
        await resubmit(new, *entries)
    assert await visible_title(new) == ("second", "private", True)


async def test_the_earlier_of_two_patches_that_comes_later_changes_nothing_the_later_set(
    open_engine: OpenEngine,
) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, change(T, patch("p", title="first", archived=True), ANN))
    await commit_one(old, change(T, patch("q", title="second"), ANN))
    first, second = await tail_of(old)
    await resubmit(new, second)
    await resubmit(new, first)
    assert await visible_title(new) == ("second", "private", True)


async def test_a_patch_that_was_moved_is_no_newer_for_it(open_engine: OpenEngine) -> None:
    """Moved into epoch 2 and cut there, it does not win over what epoch 2 said before it was moved."""
    old, new = await part_ways(open_engine)
    third = await open_engine(THIRD)
    await commit_one(new, append(T, message("c"), actor=ANN))
    await commit_one(old, change(T, patch("p", title="one"), ANN))
    await resubmit(new, *await tail_of(old))
    moved = (await log_of(new, T))[-1]
    assert (moved.epoch, moved.id) == (2, "weft:patch:p")
    await send_all(new, third, T, epoch=2)
    await elect(third, THIRD, 3)
    await commit_one(third, change(T, patch("r", title="three"), ANN))
    cut = msgspec.structs.replace(moved, id="weft:patch:again")
    await resubmit(third, cut)
    assert (await visible_title(third))[0] == "three"


@pytest.mark.parametrize(
    ("start", "in_tail", "since", "shown"),
    [
        ("team", "private", None, "private"),
        ("team", "public", None, "team"),
        ("team", "private", "public", "private"),
        ("private", "public", None, "private"),
        ("public", "team", "private", "private"),
        ("team", "public", "private", "private"),
    ],
)
async def test_a_visibility_from_a_tail_only_ever_narrows(
    open_engine: OpenEngine, start: str, in_tail: str, since: str | None, shown: str
) -> None:
    old, new = await part_ways(open_engine, visibility=start)
    await commit_one(old, change(T, patch("p", visibility=in_tail), ANN))
    if since is not None:
        await commit_one(new, change(T, patch("q", visibility=since), ANN))
    outcome = await resubmit(new, *await tail_of(old))
    row = await new.row(T)
    assert row is not None
    assert row.visibility == shown
    assert outcome.written.narrowed == (shown != (since or start))


# ---------------------------------------------------------------- conditions and keys


async def test_a_conditional_write_comes_back_flagged(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=ANN, expect=Version(1, 2)))
    await commit_one(old, append(T, message("b"), actor=ANN))
    await resubmit(new, *await tail_of(old))
    conditional, plain = meta_of(await new.find(T, "a")), meta_of(await new.find(T, "b"))
    assert (conditional.conditional, conditional.moved_from) == (True, "1.3")
    assert (plain.conditional, plain.moved_from) == (False, "1.4")


async def test_what_moved_twice_still_says_where_it_was_acknowledged(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    third = await open_engine(THIRD)
    await copy_threads(old, third, T)
    await commit_one(old, append(T, message("a"), actor=ANN))
    await resubmit(new, *await tail_of(old))
    [_, moved] = await tail_of(new)
    await elect(third, THIRD, 3)
    await commit_one(third, append(T, message("z"), actor=ANN))
    await resubmit(third, moved)
    assert meta_of(await third.find(T, "a")).moved_from == "1.3"


async def test_a_key_comes_back_with_its_entries(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("x"), actor=ANN))
    await commit_one(old, append(T, message("a"), message("b"), actor=ANN, idempotency=key("k")))
    await resubmit(new, *await tail_of(old))
    replayed = await new.replay(ANN, key("k"))
    assert replayed is not None
    assert [entry.id for entry in replayed.entries] == ["a", "b"]


async def test_a_key_never_spans_what_its_request_did_not_append(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), message("b"), actor=ANN, idempotency=key("k")))
    await commit_one(new, append(T, message("a"), message("z"), actor=ANN))
    await resubmit(new, *await tail_of(old))
    replayed = await new.replay(ANN, key("k"))
    assert replayed is not None
    assert [entry.id for entry in replayed.entries] == ["b"], "z is another request's"


# ---------------------------------------------------------------- deletions and creations


async def test_entries_for_a_deleted_thread_are_buried(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=ANN))
    await commit_one(old, change(T, patch("p", title="x"), ANN))
    await commit_one(new, delete(T, ANN))
    outcome = await resubmit(new, *await tail_of(old))
    assert outcome.fates == (("a", "buried"), ("weft:patch:p", "buried"))
    assert outcome.written.entries == ()
    row = await new.row(T)
    assert row is not None
    assert row.deleted


async def test_a_deletion_comes_back_and_what_follows_it_is_buried(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, delete(T, ANN))
    await commit_one(new, append(T, message("c"), actor=ANN))
    [deletion] = await tail_of(old)
    outcome = await resubmit(new, deletion)
    assert outcome.fates == (("weft:delete:1", "appended"),)
    assert outcome.written.narrowed
    other = (await log_of(old, T))[1]
    late = Entry(4, 1, "message", "late", other.meta, message("late").body, bytes(32))
    assert (await resubmit(new, late)).fates == (("late", "buried"),)
    with pytest.raises(ThreadNotFound):
        await new.read(T, ANN)


async def test_a_creation_that_the_holder_lacks_is_made_with_what_follows(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T, ANN, messages=messages(2), title="t", visibility="team"))
    await elect(new, PEER, 2)
    outcome = await resubmit(new, *await log_of(old, T))
    assert outcome.written.created
    assert await ids_of(new, T) == ["weft:create", "m1", "m2"], "a log of this epoch needs no mark"
    row = await new.row(T)
    assert row is not None
    assert (row.group, row.owner, row.title, row.visibility, row.epoch) == (HERE, "ann", "t", "team", 2)
    assert dict(await new.unconfirmed(T)) == {HERE: 0, THIRD: 0}
    assert {fate for _, fate in (await resubmit(new, *await log_of(old, T))).fates} == {"present"}


async def test_entries_of_a_thread_that_is_nowhere_are_nobodys_to_append(open_engine: OpenEngine) -> None:
    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(T, ANN, messages=messages(2)))
    await elect(new, PEER, 2)
    outcome = await commit_one(new, Resubmit(HERE, T, HERE, await tail_of(old, 1)))
    assert isinstance(outcome, ThreadNotFound)
    assert await new.row(T) is None


async def test_term_marks_are_dropped(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    third = await open_engine(THIRD)
    await copy_threads(old, third, T)
    await commit_one(new, append(T, message("a"), actor=ANN))
    await elect(third, THIRD, 3)
    await commit_one(third, append(T, message("b"), actor=ANN))
    outcome = await resubmit(third, *await tail_of(new))
    assert outcome.fates == (("weft:term:2", "dropped"), ("a", "appended"))
    assert await ids_of(third, T) == ["weft:create", "m1", "weft:term:3", "b", "a"]


# ---------------------------------------------------------------- claims


async def test_of_two_claims_the_first_stands(open_engine: OpenEngine) -> None:
    claims = f"{CLAIMS_PREFIX}0a"

    def claim(owner: str) -> Write:
        body = encode(ClaimBody(group=HERE, issuer="i", owner=owner))
        return Write(claims, INTERNAL, "update", messages=(Draft("claim", "some-id", body),))

    old, new = await open_engine(HERE), await open_engine(PEER)
    await commit_one(old, create(claims, INTERNAL, visibility="public"))
    await copy_threads(old, new, claims)
    await elect(new, PEER, 2)
    for engine, owner in ((old, "ann"), (new, "bob")):
        assert isinstance(await commit_one(engine, claim(owner)), Written)
    outcome = await resubmit(new, *await tail_of(old, 1, claims), thread_id=claims)
    assert outcome.fates == (("some-id", "present"),)
    entry = await new.find(claims, "some-id")
    assert entry is not None
    assert msgspec.json.decode(entry.body, type=ClaimBody).owner == "bob"


# ---------------------------------------------------------------- who may


async def test_only_the_holder_takes_them(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=ANN))
    tail = await tail_of(old)
    third = await open_engine(THIRD)
    await copy_threads(old, third, T)
    assert isinstance(await commit_one(third, Resubmit(HERE, T, HERE, tail)), NotHolder)
    outcomes = await new.commit([Promise(HERE, 3, THIRD, "disk"), Resubmit(HERE, T, HERE, tail)])
    assert isinstance(outcomes[1], Fenced)
    assert await new.find(T, "a") is None


async def test_poison_fails_alone(open_engine: OpenEngine) -> None:
    """Submitted again and again, it would fail each batch that it comes in, and the writes of others with it."""
    old, new = await part_ways(open_engine)
    await commit_one(old, append(T, message("a"), actor=ANN))
    [entry] = await tail_of(old)
    for field, value in (("body", b'{"id":"bad"}'), ("meta", b'{"at":"never"}')):
        bad = msgspec.structs.replace(entry, **{"id": "bad", field: value})
        first, refused, last = await new.commit(
            [
                append(T, message(f"x{field}"), actor=ANN),
                Resubmit(HERE, T, HERE, (entry, bad)),
                append(T, message(f"y{field}"), actor=ANN),
            ]
        )
        assert isinstance(first, Written)
        assert isinstance(refused, NotAllowed)
        assert isinstance(last, Written)
    assert await new.find(T, "a") is None, "none of it"


async def test_a_whole_round_leaves_every_region_with_every_entry_once(open_engine: OpenEngine) -> None:
    old, new = await part_ways(open_engine, visibility="team")
    third = await open_engine(THIRD)
    await copy_threads(old, third, T)
    await commit_one(old, append(T, message("a"), actor=ANN, idempotency=key("k")))
    await commit_one(old, change(T, patch("p", visibility="private"), ANN))
    await commit_one(new, append(T, message("c"), actor=user("cid", "red")))
    await elect(third, THIRD, 3, followers=[old, new])
    await commit_one(third, append(T, message("d"), actor=ANN))
    for engine, region in ((old, HERE), (new, PEER)):
        await send_all(third, engine, T, epoch=3)
        await submit_saved(engine, region, third, T)
    for engine in (old, new):
        await send_all(third, engine, T, epoch=3)
        assert await log_of(engine, T) == await log_of(third, T)
        assert await engine.held_access() == {}
        await check_logs(engine, T)
    assert await ids_of(third, T) == ["weft:create", "m1", "weft:term:3", "d", "a", "weft:patch:p", "c"]
    row = await third.row(T)
    assert row is not None
    assert row.visibility == "private"
