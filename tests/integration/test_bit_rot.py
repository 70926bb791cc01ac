"""Bytes turned on the disk of a real region: `weft repair --scrub` puts them back, or says what it could not."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from tests.support.processes import everything_at, running_cluster, wait_until, weft

REGIONS = ("us-east", "eu-west", "ap-south")


def turn(path: Path, text: bytes) -> int:
    """Turn a bit wherever `text` lies in the file; how often."""
    data = bytearray(path.read_bytes())
    at, count = data.find(text), 0
    while at >= 0:
        data[at + len(text) // 2] ^= 1
        count += 1
        at = data.find(text, at + 1)
    path.write_bytes(data)
    return count


def test_bytes_turned_in_a_region_are_put_back(tmp_path: Path) -> None:
    data = tmp_path / "data"
    words = {name: f"Needle-{name}-in-a-haystack" for name in REGIONS}
    with running_cluster(data) as cluster:
        token = cluster.token()
        for name in REGIONS:
            texts = [f"{words[name]} {number} " + "word " * (70_000 if number == 3 else 5) for number in range(8)]
            thread = {"title": f"About {name}", "messages": [{"role": "user", "content": text} for text in texts]}
            request = urllib.request.Request(
                f"{cluster.edge(name)}/api/threads",
                json.dumps(thread).encode(),
                {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as answer:
                assert answer.status == 201
        wait_until(
            lambda: all(len(everything_at(cluster.edge(it), token)) >= 3 for it in REGIONS), what="all is everywhere"
        )
        before = everything_at(cluster.edge("us-east"), token)
    turned = 0
    for name in REGIONS:  # each region loses another part, so that each is healed with another one's
        folder = data / "regions" / name
        turned += turn(folder / "weft.db", words[name].encode())
        for path in (folder / "bodies").glob("*/*"):
            if words[name].encode() in path.read_bytes()[:200]:
                turned += turn(path, b"word word word")
    assert turned > 20
    with running_cluster(data) as cluster:
        done = weft("repair", "--scrub", "--data", str(data), "--json", timeout=240)
        said = {it["name"]: it["scrub"] for it in json.loads(done.stdout)["regions"]}
        for name in REGIONS:
            assert said[name]["findings"] == [] and said[name]["mended"], said[name]
        again = weft("repair", "--scrub", "--data", str(data), "--json")
        assert all(not it["scrub"]["mended"] for it in json.loads(again.stdout)["regions"])
        for name in REGIONS:
            after = everything_at(cluster.edge(name), cluster.token())
            assert after == before
        shown = weft("repair", "--scrub", "--data", str(data)).stdout
        assert "all sound" in shown
