"""aider's chat history: who wrote a line, what a session is, and what growth does to ids."""

from __future__ import annotations

from io import BytesIO

from origin.importers import aider
from origin.importers.base import ImportedThread, Tally
from origin.importers.lines import read_lines

HEADER = "# aider chat started at 2026-04-18 10:03:40\n\n"
BANNER = "> Aider v0.86.1  \n> Main model: some/model-1 with diff edit format  \n"


def read(text: str) -> tuple[list[ImportedThread], Tally]:
    tally = Tally()
    return aider.read(text.encode().split(b"\n"), tally), tally


def said(text: str) -> list[tuple[object, object]]:
    threads, _ = read(text)
    assert len(threads) == 1
    return [(it.body["role"], it.body["content"]) for it in threads[0].messages]


def test_input_answers_and_tool_output_are_messages() -> None:
    assert said(
        HEADER + BANNER + "\n#### fix `f`  \n####   \n#### and test it  \n\nSure:\n\n```python\n# code\n```\n\n"
        "> Tokens: 5,244 sent, 604 received. Cost: $0.02 request, $0.02 session.  \n"
        "> Commit d0ffbf1 fix: f  \n"
    ) == [
        ("tool", "Aider v0.86.1\nMain model: some/model-1 with diff edit format"),
        ("user", "fix `f`\n\nand test it"),
        ("assistant", "Sure:\n\n```python\n# code\n```"),
        ("tool", "Tokens: 5,244 sent, 604 received. Cost: $0.02 request, $0.02 session.\nCommit d0ffbf1 fix: f"),
    ]


def test_messages_know_their_time_model_tokens_and_commits() -> None:
    threads, _ = read(
        HEADER + BANNER + "\n#### /add x.py  \n\nDone.\n\n> Tokens: 2.6k sent, 1M cache hit, 144 received. "
        "Cost: $0.0012 message, $0.01 session.  \n> Commit d0ffbf1 fix: f  \n"
    )
    bodies = [it.body for it in threads[0].messages]
    assert [it["created_at"] for it in bodies] == [f"2026-04-18T10:03:40.00{ms}Z" for ms in range(4)]
    assert bodies[1]["metadata"] == {"command": "/add"}
    assert bodies[2]["metadata"] == {"model": "some/model-1"}
    assert bodies[3]["metadata"] == {"commits": ["d0ffbf1"]}
    assert bodies[3]["usage"] == {"input_tokens": 2600, "output_tokens": 144, "cost_usd": 0.0012}
    assert threads[0].created_at == "2026-04-18T10:03:40.000Z"
    assert threads[0].metadata == {"started": "2026-04-18 10:03:40", "model": "some/model-1"}


def test_tokens_of_old_versions_are_counted_too() -> None:
    threads, _ = read(HEADER + "#### hi  \n> 34,113 prompt tokens, 83 completion tokens, $0.171810 cost  \n")
    assert threads[0].messages[1].body["usage"] == {
        "input_tokens": 34113,
        "output_tokens": 83,
        "cost_usd": 0.17181,
    }


def test_headings_and_quotes_in_an_answer_stay_in_the_answer() -> None:
    answer = "Plan:\n\n#### Fixing `a`\n\n> a quotation\n\n```diff\n>>>>>>> REPLACE\n#### not input\n```"
    assert said(HEADER + BANNER + "\n#### go  \n\n" + answer + "\n\n> Applied edit to x  \n")[2:] == [
        ("assistant", answer),
        ("tool", "Applied edit to x"),
    ]
    assert said(HEADER + BANNER + "\n#### go  \n\n> It is written\n\nsays the manual.\n\n")[2:] == [
        ("assistant", "> It is written\n\nsays the manual."),
    ]


def test_input_after_a_fence_that_was_never_closed_is_input() -> None:
    assert said(
        HEADER + BANNER + "\n#### go  \n\n```python\nx = 1\n\n> Tokens: 1 sent, 1 received.  \n\n#### /undo  \n"
    )[3:] == [("tool", "Tokens: 1 sent, 1 received."), ("user", "/undo")]


def test_tool_output_of_several_lines_ends_at_the_two_blanks() -> None:
    output = "===== test session starts =====\n\nE   assert 1 == 2\n        \n    def f():\n===== 1 failed ====="
    assert said(HEADER + BANNER + f"\n#### /test  \n> {output}  \n\nThe test fails.\n\n")[1:] == [
        ("user", "/test"),
        ("tool", output),
        ("assistant", "The test fails."),
    ]


def test_inputs_with_an_empty_line_between_them_are_two() -> None:
    assert said(HEADER + "#### /undo  \n\n#### /undo  \n") == [("user", "/undo"), ("user", "/undo")]


def test_a_file_whose_trailing_blanks_were_stripped_is_read_by_fences() -> None:
    text = (
        HEADER
        + BANNER
        + "\n#### go  \n####   \n#### on  \n\nHere:\n```\n#### no input\n> nor output\n```\n\n> Done  \n"
    )
    stripped = "\n".join(it.rstrip() for it in text.split("\n"))
    assert said(stripped)[1:] == [
        ("user", "go\n\non"),
        ("assistant", "Here:\n```\n#### no input\n> nor output\n```"),
        ("tool", "Done"),
    ]


def test_crlf_files_read_the_same() -> None:
    text = HEADER + BANNER + "\n#### go  \n\nYes.\n"
    threads = aider.read(read_lines(BytesIO(text.replace("\n", "\r\n").encode()), Tally()), Tally())
    assert threads == read(text)[0]


def test_sessions_in_which_nothing_was_said_are_no_threads() -> None:
    threads, tally = read(
        "preamble\n\n"
        + HEADER
        + BANNER
        + "\n"
        + HEADER
        + "\n"
        + HEADER
        + BANNER
        + "\n#### <blank>  \n\n"
        + HEADER
        + "####   \n\n"
        + HEADER
        + BANNER
        + "\nAn answer to nobody.\n"
    )
    assert [it.title for it in threads] == ["An answer to nobody."]
    assert tally.skipped == {"line before the first session": 1, "session in which nothing was said": 4}


def test_the_title_is_a_question_rather_than_a_command() -> None:
    lint = "#### # Fix any errors below, if possible.  \n\n"
    assert read(HEADER + "#### /add x  \n\n" + lint + "#### why?  \n")[0][0].title == "why?"
    assert read(HEADER + "\nHello.\n\n#### /exit  \n")[0][0].title == "/exit"


def test_sessions_begun_in_the_same_second_are_told_apart() -> None:
    same, other = HEADER + "#### one  \n\n", HEADER + "#### two  \n\n"
    names = [it.source_id for it in read(same + other + same)[0]]
    assert len(set(names)) == 3
    assert [it.source_id for it in read(other + same)[0]] == [names[1], names[0]]
    assert all(it.startswith("2026-04-18T10:03:40/") for it in names)


def test_a_grown_file_keeps_what_it_had_and_adds_what_is_new() -> None:
    whole = HEADER + BANNER + "\n#### go  \n#### on  \n\nYes,\n\nindeed.\n\n> Applied edit to x  \n\n#### thanks  \n"
    everything = [(it.source_id, it.body) for it in read(whole)[0][0].messages]
    for cut in (place + 1 for place, character in enumerate(whole) if character == "\n"):
        for thread in read(whole[:cut])[0]:
            got = [(it.source_id, it.body) for it in thread.messages]
            assert got[:-1] == everything[: len(got) - 1]
            assert got[-1] == everything[len(got) - 1] or got[-1][0] not in dict(everything)
            if "\n#### go  \n" in whole[:cut]:
                assert thread.source_id == read(whole)[0][0].source_id


def test_a_header_that_is_no_date_has_no_time() -> None:
    for started in ("2026-13-45 99:99:99", "9999-12-31 23:59:59"):
        threads, _ = read(f"# aider chat started at {started}\n\n#### hi  \n")
        assert threads[0].created_at is None and "created_at" not in threads[0].messages[0].body


def test_only_a_whole_header_line_is_recognised() -> None:
    assert aider.recognises(b"# aider chat started at 2026-04-18 10:03:40")
    assert aider.recognises(b"# aider chat started at 2026-04-18 10:03:40  ")
    assert not aider.recognises(b"the line `# aider chat started at 2026-04-18 10:03:40`")
    assert not aider.recognises(b"# aider chat started at YYYY-MM-DD HH:MM:SS")
    assert not aider.recognises(b"# aider chat started at 2026-04-18 10:03:40 and more")
