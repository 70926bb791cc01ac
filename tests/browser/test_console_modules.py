"""Modules of the console that need no browser, run by Node: event streams however they are cut."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from edge.console.build import SOURCES
from tests.support.npm import missing

DRIVER = """
import { EventParser } from %s;
const cases = JSON.parse(await new Promise((done) => {
  let text = ""; process.stdin.on("data", (chunk) => (text += chunk)).on("end", () => done(text));
}));
console.log(JSON.stringify(cases.map((pieces) => {
  const events = [];
  const parser = new EventParser((event) => events.push(event));
  for (const piece of pieces) parser.push(piece);
  return [events, parser.id, parser.retry];
})));
"""


def parsed(cases: list[list[str]], tmp_path: Path) -> list[Any]:
    node = shutil.which("node")
    if node is None:
        missing("Node is not installed")
    # As browsers do, take .js for modules; Node wants to be told, and not by a file among the sources.
    modules = tmp_path / "console"
    shutil.copytree(SOURCES / "console", modules, dirs_exist_ok=True)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    driver = tmp_path / "driver.mjs"
    driver.write_text(DRIVER % json.dumps((modules / "events.js").as_uri()))
    done = subprocess.run(
        [node, driver], input=json.dumps(cases), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_events_are_those_of_the_standard(tmp_path: Path):
    """HTML standard, section 9.2.6, with its own examples."""
    stream = (
        ": a comment\nretry: 1000\nid: 1.7\n: connected\n\n"
        "data: first event\nid: 1\n\n"
        "data:second event\nid\n\n"
        "data:  third event\n\n"
        "data\n\ndata\ndata\n\n"
        "event: patch\ndata: {}\nretry: soon\nid: 2\0\n\n"
        "event: nothing\n\n"
        "unknown: x\ndata: last\n\n"
        "data: never finished"
    )
    [[events, last_id, retry]] = parsed([[stream]], tmp_path)
    assert [(event["type"], event["data"], event["id"]) for event in events] == [
        ("message", "first event", "1"),
        ("message", "second event", ""),
        ("message", " third event", ""),
        ("message", "", ""),
        ("message", "\n", ""),
        ("patch", "{}", ""),
        ("message", "last", ""),
    ]
    assert (last_id, retry) == ("", 1000)


def test_it_does_not_matter_how_a_stream_is_cut(tmp_path: Path):
    rng = random.Random(7)
    cases: list[list[str]] = []
    for _ in range(60):
        lines = [
            rng.choice(["data: x", "data: ünï", "id: 1.5", "event: reset", ": hush", "", "", "retry: 5", "data", "id"])
            for _ in range(rng.randint(0, 14))
        ]
        text = "".join(line + rng.choice(["\n", "\r\n", "\r"]) for line in lines) + "\n\nid: 9\n"
        cases.append([text])
        for _ in range(4):
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 12)))
            cases.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    found = parsed(cases, tmp_path)
    for start in range(0, len(cases), 5):
        assert all(found[start + n] == found[start] for n in range(1, 5)), cases[start]
