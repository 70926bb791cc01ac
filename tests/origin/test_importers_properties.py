"""What must hold of every importer whatever it is given, on the samples that ship, on anything, and on real data.

The real conversations are not part of the repository. They are looked for in the folder that WEFT_TEST_DATA names,
else in `shared/data/threads` beside the repository; without them those tests are skipped.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.clock import parse_rfc3339
from origin.importers import base
from origin.importers.base import ImportedThread, Tally, ThreadDocument, identify
from origin.importers.scan import SAMPLES, read_stream, scan

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("WEFT_TEST_DATA") or ROOT.parent / "shared" / "data" / "threads")
needs_data = pytest.mark.skipif(
    not (DATA / "claude-code-jsonl").is_dir(),
    reason="the real conversations (sibling shared/data/threads) are not here",
)

SAMPLE_FILES = sorted(path for path in SAMPLES.rglob("*") if path.is_file())
LINE_FORMATS = ("claude-code", "codex", "aider")


def read(data: bytes) -> list[ImportedThread]:
    return read_stream(io.BytesIO(data), Tally())[1]


def documents(data: bytes) -> list[ThreadDocument]:
    return [identify(thread, "issuer", "subject") for thread in read(data)]


class Store:
    """What the server does with an import: entries that are there are kept, an id never changes its body."""

    def __init__(self) -> None:
        self.threads: dict[str, dict[str, object]] = {}

    def put(self, document: ThreadDocument) -> int:
        """Returns how many messages were new."""
        held = self.threads.setdefault(document["id"], {})
        before = len(held)
        for message in document["messages"]:
            assert held.setdefault(message["id"], message) == message, "an id was given another body"
        return len(held) - before

    def put_all(self, paths: Iterable[Path]) -> int:
        return sum(self.put(document) for path in paths for document in documents(path.read_bytes()))


def assert_sound(threads: list[ImportedThread]) -> None:
    """Every thread can be sent: JSON that all libraries take, ids unique, parents above, times that parse."""
    for thread in threads:
        document = identify(thread, "issuer", "subject")
        assert document["messages"] and len(document["title"]) <= base.TITLE_CHARS_MAX
        assert len(msgspec.json.encode(document["metadata"])) < 32_768
        seen: set[str] = set()
        for message in document["messages"]:
            assert message["role"] in ("user", "assistant", "system", "tool")
            content = message["content"]
            assert isinstance(content, str | list)
            assert isinstance(content, str) or all(isinstance(block["type"], str) for block in content)
            assert message["parent_id"] is None or message["parent_id"] in seen
            assert message["id"] not in seen
            seen.add(message["id"])
            if "created_at" in message:
                parse_rfc3339(message["created_at"])
        text = json.dumps(document, allow_nan=False, ensure_ascii=False)
        assert msgspec.json.decode(text.encode()) == document


def cuts(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """Beginnings of a file as it was when it had fewer lines."""
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for end in sorted(rng.sample(ends, min(count, len(ends)))):
        yield data[:end]


def assert_grows(data: bytes, earlier: bytes) -> None:
    """All that an earlier, shorter file gave is in what the whole file gives, and nothing of it reads otherwise.

    Except, in aider's histories, the last message of the last session: it may have been cut short, and is then
    another message.
    """
    whole = {thread.source_id: thread for thread in read(data)}
    for position, thread in enumerate(got := read(earlier)):
        messages = list(thread.messages)
        unfinished = thread.format == "aider" and position == len(got) - 1
        expected = list(whole[thread.source_id].messages)
        kept = messages[:-1] if unfinished else messages
        assert kept == expected[: len(kept)]
        if unfinished and messages[-1] != expected[len(kept)]:
            assert messages[-1].source_id not in {message.source_id for message in expected}
        assert thread.relations == whole[thread.source_id].relations


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=lambda path: path.name)
def test_importing_a_sample_again_changes_nothing(path: Path) -> None:
    store = Store()
    assert store.put_all([path]) > 0
    assert store.put_all([path, path]) == 0
    assert_sound(read(path.read_bytes()))


@pytest.mark.parametrize(
    "path", [it for it in SAMPLE_FILES if it.relative_to(SAMPLES).parts[0] in LINE_FORMATS], ids=lambda path: path.name
)
def test_a_sample_that_grew_line_by_line_reads_as_before(path: Path) -> None:
    data = path.read_bytes()
    for earlier in cuts(data, random.Random(1), 10_000):
        assert_grows(data, earlier)


def test_a_torn_last_line_is_a_bad_line_and_its_rest_is_added_later() -> None:
    path = next(it for it in SAMPLE_FILES if it.suffix == ".jsonl" and "agent-" not in it.name)
    data = path.read_bytes()
    rng = random.Random(2)
    for _ in range(100):
        assert_grows(data, data[: rng.randrange(len(data))])


def test_the_order_of_files_does_not_matter() -> None:
    stores: list[dict[str, set[str]]] = []
    for seed in range(5):
        files = [*SAMPLE_FILES, *SAMPLE_FILES[:3]]
        random.Random(seed).shuffle(files)
        store = Store()
        store.put_all(files)
        stores.append({thread: set(held) for thread, held in store.threads.items()})
    assert all(store == stores[0] for store in stores)


def test_two_people_import_two_threads() -> None:
    (thread, *_) = read(SAMPLE_FILES[0].read_bytes())
    mine, yours = identify(thread, "issuer", "mira"), identify(thread, "issuer", "noor")
    assert mine["id"] != yours["id"]
    assert not {it["id"] for it in mine["messages"]} & {it["id"] for it in yours["messages"]}


@given(st.binary(max_size=4_000))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_it_raise(data: bytes) -> None:
    assert_sound(read(data))


@given(st.text(alphabet=st.sampled_from("#> `\n\ta1/ \r\x00é"), max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_text_after_a_header_makes_it_raise(text: str, blanks: bool) -> None:
    banner = "> Aider  \n" if blanks else "> Aider\n"
    assert_sound(read(f"# aider chat started at 2026-04-18 10:03:40\n\n{banner}{text}".encode()))


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_damage_to_a_file_makes_it_raise(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SAMPLE_FILES)).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 400)))
        content[start:end] = data.draw(
            st.one_of(
                st.just(b""),
                st.binary(max_size=40),
                st.just(bytes(content[start:end]) * 2),
                st.sampled_from(
                    [b"\\ud83d", b"NaN", b"1e999", b"null", b"[]", b"{}", b'"', b"\n", b"\0", b"9" * 5_000]
                ),
            )
        )
    assert_sound(read(bytes(content)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def replaced(value: object, rng: random.Random, other: object, chance: float) -> object:
    """The same JSON with values here and there replaced by another."""
    if rng.random() < chance:
        return other
    if isinstance(value, dict):
        return {key: replaced(item, rng, other, chance) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, rng, other, chance) for item in value]
    return value


@given(st.sampled_from(SAMPLE_FILES), st.integers(0, 1 << 32), JSON, st.sampled_from([0.003, 0.03, 0.2]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_value_in_an_unexpected_place_makes_it_raise(path: Path, seed: int, other: object, chance: float) -> None:
    rng = random.Random(seed)
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = [json.dumps(replaced(json.loads(line), rng, other, chance)) for line in data.splitlines()]
        assert_sound(read("\n".join(lines).encode()))
    elif path.suffix != ".md":
        assert_sound(read(json.dumps(replaced(json.loads(data), rng, other, chance)).encode()))


@pytest.fixture(scope="module")
def everything() -> dict[Path, list[ImportedThread]]:
    """All files of the real data, read once."""
    return {report.path: threads for report, threads in scan([DATA])}


def below(everything: dict[Path, list[ImportedThread]], folder: str) -> list[ImportedThread]:
    return [it for path, threads in everything.items() if path.is_relative_to(DATA / folder) for it in threads]


@needs_data
def test_all_real_data_goes_through(everything: dict[Path, list[ImportedThread]]) -> None:
    errors = [report.errors for report, _ in scan([DATA]) if report.errors]
    assert errors == []
    for threads in everything.values():
        assert_sound(threads)


@needs_data
def test_real_claude_code_files_are_as_many_threads_as_sessions(everything: dict[Path, list[ImportedThread]]) -> None:
    """Of 42 files six are empty and one holds only summaries; 35 hold messages, as the reference says, and three
    of these are snapshots of one session, which leaves 33 threads. The reference counts lines of user and
    assistant; 121 system lines that tell something come to them, and 453 come again in the snapshots."""
    threads = below(everything, "claude-code-jsonl")
    assert len(threads) == 35
    merged: dict[str, set[str]] = {}
    for thread in threads:
        merged.setdefault(thread.source_id, set()).update(it.source_id for it in thread.messages)
    assert len(merged) == 33
    roles = Counter("system" if it.body["role"] == "system" else "said" for t in threads for it in t.messages)
    assert roles == {"said": 1303 + 512 + 1093, "system": 121}
    assert sum(map(len, merged.values())) == 2908 + 121 - 453
    children = [thread for thread in threads if thread.relations]
    assert len(children) == 10
    brought = [it.relations for thread in threads for message in thread.messages for it in [message] if it.relations]
    assert len(brought) == 4


@needs_data
@pytest.mark.parametrize(
    ("folder", "threads", "messages"),
    [
        ("swe-agent-traj", 7, 156),
        ("mini-swe-agent-traj", 1, 6),
        ("openhands-events-json", 2, 10),
        ("openhands-output-jsonl", 2, 52),
    ],
)
def test_real_trajectories_count_as_their_reference(
    everything: dict[Path, list[ImportedThread]], folder: str, threads: int, messages: int
) -> None:
    found = below(everything, folder)
    assert len({it.source_id for it in found}) == len(found) == threads
    assert sum(len(it.messages) for it in found) == messages


@needs_data
def test_real_aider_sessions_are_those_in_which_something_was_said(
    everything: dict[Path, list[ImportedThread]],
) -> None:
    """623 headers less 207: in 194 no one typed and nothing was answered, in 13 more the only text that is neither
    input nor marked output is the rest of a piece of output (two of these have an answer after all, and are kept),
    and in two the only input was empty."""
    found = below(everything, "aider-chat-history-md")
    assert len({it.source_id for it in found}) == len(found) == 540 + 83 - 194 - 13 + 2 - 2
    roles = Counter(it.body["role"] for thread in found for it in thread.messages)
    assert roles["user"] + roles["assistant"] == 1721


@needs_data
def test_real_usage_counts_every_api_message_once(everything: dict[Path, list[ImportedThread]]) -> None:
    for path in (DATA / "claude-code-jsonl").rglob("*.jsonl"):
        reported: dict[str, int] = {}
        for line in path.read_bytes().splitlines():
            record = json.loads(line)
            if record.get("type") == "assistant":
                reported[record["message"]["id"]] = record["message"]["usage"]["output_tokens"]
        usages = [it.body["usage"] for thread in everything[path] for it in thread.messages]
        assert sum(it.get("output_tokens", 0) for it in usages if isinstance(it, dict)) == sum(reported.values())


@needs_data
def test_real_tool_results_answer_a_call_above_them(everything: dict[Path, list[ImportedThread]]) -> None:
    for folder in ("claude-code-jsonl", "swe-agent-traj", "openhands-events-json", "openhands-output-jsonl"):
        for thread in below(everything, folder):
            if "acompact" in thread.source_id:
                continue  # begins in the middle of the session it compacts
            calls: set[object] = set()
            for message in thread.messages:
                content = message.body["content"]
                for block in content if isinstance(content, list) else []:
                    if block["type"] == "tool_use":
                        calls.add(block["id"])
                    elif block["type"] == "tool_result":
                        assert block["tool_use_id"] in calls


@needs_data
def test_real_files_that_grew_read_as_before() -> None:
    rng = random.Random(3)
    paths = [*(DATA / "claude-code-jsonl").rglob("*.jsonl"), *(DATA / "aider-chat-history-md").rglob("*.md")]
    for path in sorted(paths):
        data = path.read_bytes()
        for earlier in cuts(data, rng, 3):
            assert_grows(data, earlier)


@needs_data
def test_real_trajectories_that_grew_read_as_before() -> None:
    rng = random.Random(4)
    for path in sorted(DATA.rglob("*.traj")):
        run = json.loads(path.read_bytes())
        length = rng.randrange(4, len(run["history"]))
        earlier = run | {"history": run["history"][:length], "info": {}}
        assert_grows(path.read_bytes(), json.dumps(earlier).encode())
    for path in sorted((DATA / "openhands-events-json").rglob("*.json")):
        events = json.loads(path.read_bytes())
        for length in range(1, len(events)):
            assert_grows(path.read_bytes(), json.dumps(events[:length]).encode())


@needs_data
def test_real_snapshots_give_one_thread_in_any_order_and_the_order_of_the_longest() -> None:
    snapshots = sorted((DATA / "claude-code-jsonl" / "yutakobayashidev__repiq").rglob("*.jsonl"))
    orders: set[tuple[str, ...]] = set()
    for seed in range(6):
        files = [*snapshots, *snapshots]
        random.Random(seed).shuffle(files)
        store = Store()
        store.put_all(files)
        assert len(store.threads) == 3
        orders.add(tuple(max(store.threads.values(), key=len)))
    assert len(orders) == 1 and len(next(iter(orders))) == 441


@needs_data
def test_all_real_data_imported_again_in_another_order_changes_nothing(
    everything: dict[Path, list[ImportedThread]],
) -> None:
    store = Store()
    paths = list(everything)
    total = store.put_all(paths)
    assert total == sum(map(len, store.threads.values()))
    random.Random(5).shuffle(paths)
    assert store.put_all(paths) == 0
