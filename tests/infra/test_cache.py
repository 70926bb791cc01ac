from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.cache import ByteLRU, Marks


def cache(size_bytes_max: int = 100, items_max: int = 10, item_bytes_max: int | None = 100) -> ByteLRU[str, str]:
    return ByteLRU(size_bytes_max=size_bytes_max, items_max=items_max, item_bytes_max=item_bytes_max)


def test_what_was_put_is_got_until_it_expires() -> None:
    lru = cache()
    lru.put("a", "A", 10, expires_at=5.0)
    assert lru.get("a", now=4.999) == "A"
    assert lru.get("a", now=5.0) is None
    assert lru.get("a", now=0.0) is None, "an expired entry is gone, even for a clock that was set back"
    assert lru.statistics().size_bytes == 0
    assert lru.statistics().expired == 1


def test_the_least_recently_used_goes_first_when_bytes_run_out() -> None:
    lru = cache(size_bytes_max=30)
    for key in "abc":
        lru.put(key, key.upper(), 10)
    assert lru.get("a", 0) == "A"
    lru.put("d", "D", 20)
    assert (lru.get("b", 0), lru.get("c", 0)) == (None, None)
    assert (lru.get("a", 0), lru.get("d", 0)) == ("A", "D")
    assert lru.statistics().evicted == 2


def test_weightless_entries_are_bounded_by_their_number() -> None:
    lru = cache(items_max=3)
    for number in range(100):
        lru.put(str(number), "", 0)
    assert len(lru) == 3
    assert lru.get("99", 0) == ""


def test_an_entry_over_the_cap_is_refused_and_takes_the_value_it_supersedes_with_it() -> None:
    lru = cache(item_bytes_max=50)
    lru.put("other", "O", 40)
    lru.put("a", "old", 10)
    assert lru.put("a", "new", 51) is False
    assert lru.get("a", 0) is None
    assert lru.get("other", 0) == "O", "an oversize entry evicts nobody"
    assert lru.statistics().oversize == 1


def test_by_default_one_entry_cannot_take_more_than_an_eighth() -> None:
    lru = cache(size_bytes_max=80, item_bytes_max=None)
    assert lru.put("a", "A", 10) is True
    assert lru.put("b", "B", 11) is False


def test_replacing_an_entry_frees_its_weight_and_its_tags() -> None:
    lru = cache()
    lru.put("a", "old", 60, tags=("x",))
    lru.put("a", "new", 20, tags=("y",))
    assert lru.statistics().size_bytes == 20
    assert lru.drop_tag("x") == 0
    assert lru.get("a", 0) == "new"


def test_dropping_a_tag_drops_all_that_carry_it_and_only_those() -> None:
    lru = cache()
    lru.put("a", "A", 1, tags=("thread:1", "user:u"))
    lru.put("b", "B", 1, tags=("thread:2", "user:u"))
    lru.put("c", "C", 1, tags=("thread:1",))
    lru.put("d", "D", 1)
    assert lru.drop_tag("thread:1") == 2
    assert lru.drop_tag("thread:1") == 0
    assert [lru.get(key, 0) for key in "abcd"] == [None, "B", None, "D"]
    assert lru.drop_tag("user:u") == 1


def test_a_tag_named_twice_is_one_tag() -> None:
    lru = cache()
    lru.put("a", "A", 1, tags=("t", "t"))
    assert lru.drop_tag("t") == 1
    assert lru.statistics().tags == 0


def test_tags_of_evicted_and_popped_entries_leave_the_index() -> None:
    lru = cache(items_max=2)
    for number in range(50):
        lru.put(str(number), "", 1, tags=(f"tag-{number}",))
    assert lru.statistics().tags == 2
    assert lru.pop("49") == ""
    assert lru.pop("49") is None
    assert lru.statistics().tags == 1


def test_clear_empties_everything() -> None:
    lru = cache()
    lru.put("a", "A", 1, tags=("t",))
    lru.clear()
    after = lru.statistics()
    assert (after.items, after.size_bytes, after.tags) == (0, 0, 0)
    assert lru.drop_tag("t") == 0


@pytest.mark.parametrize("limits", [(0, 1, None), (1, 0, None), (1, 1, 0)])
def test_a_cache_without_room_is_a_mistake(limits: tuple[int, int, int | None]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        cache(*limits)


def test_a_negative_weight_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="-1"):
        cache().put("a", "A", -1)


def test_it_tells_how_full_it_is() -> None:
    lru = cache()
    lru.put("a", "A", 7)
    lru.get("a", 0)
    assert repr(lru) == "<ByteLRU 1/10 items, 7/100 bytes, 1 hits, 0 misses>"


KEYS = st.sampled_from("abcdef")
TAGS = st.lists(st.sampled_from(["t1", "t2", "t3"]), max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 14), st.one_of(st.none(), st.integers(0, 40)), TAGS),
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("pop"), KEYS),
        st.tuples(st.just("drop"), st.sampled_from(["t1", "t2", "t3"])),
    ),
    max_size=60,
)


@given(STEPS)
def test_any_sequence_of_operations_agrees_with_a_plain_model(steps: list[tuple]) -> None:
    lru: ByteLRU[str, int] = ByteLRU(size_bytes_max=24, items_max=4, item_bytes_max=12)
    model: OrderedDict[str, tuple[int, int, float | None, set[str]]] = OrderedDict()
    for now, step in enumerate(steps):
        match step:
            case ("put", key, size, expires_at, tags):
                model.pop(key, None)
                assert lru.put(key, now, size, expires_at, tags) is (size <= 12)
                if size <= 12:
                    model[key] = (now, size, expires_at, set(tags))
                while len(model) > 4 or sum(size for _, size, _, _ in model.values()) > 24:
                    model.popitem(last=False)
            case ("get", key):
                held = model.get(key)
                if held is not None and held[2] is not None and held[2] <= now:
                    del model[key]
                    held = None
                if held is not None:
                    model.move_to_end(key)
                assert lru.get(key, now) == (held and held[0])
            case ("pop", key):
                held = model.pop(key, None)
                assert lru.pop(key) == (held and held[0])
            case ("drop", tag):
                carriers = [key for key, held in model.items() if tag in held[3]]
                assert lru.drop_tag(tag) == len(carriers)
                for key in carriers:
                    del model[key]
        after = lru.statistics()
        assert after.items == len(model)
        assert after.size_bytes == sum(size for _, size, _, _ in model.values())
        assert after.tags == len({tag for held in model.values() for tag in held[3]})


def test_marks_remember_the_highest_and_forget_into_a_floor():
    marks = Marks(names_max=2)
    marks.raise_to("a", 5)
    marks.raise_to("a", 3)
    assert (marks.get("a"), marks.get("b")) == (5, 0)
    marks.raise_to("b", 6)
    marks.raise_to("c", 7)
    assert (marks.get("a"), marks.get("b"), marks.get("z")) == (5, 6, 5)
    marks.clear()
    assert marks.get("a") == 0


def test_every_value_that_is_held_no_longer_is_told_of_once() -> None:
    gone: list[str] = []
    lru: ByteLRU[str, str] = ByteLRU(size_bytes_max=100, items_max=3, item_bytes_max=100, on_remove=gone.append)
    for value in ("replaced", "a"):
        lru.put("a", value, 1)
    lru.put("expired", "expired", 1, expires_at=1.0)
    lru.get("expired", now=1.0)
    lru.put("tagged", "tagged", 1, tags=("t",))
    lru.drop_tag("t")
    lru.put("popped", "popped", 1)
    lru.pop("popped")
    for value in ("b", "c", "d"):
        lru.put(value, value, 1)
    assert gone == ["replaced", "expired", "tagged", "popped", "a"]
    lru.put("c", "too heavy", 101)
    lru.clear()
    assert gone[5:] == ["c", "b", "d"]
