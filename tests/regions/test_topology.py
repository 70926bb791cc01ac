"""Regions, their marks, and who answers for an id."""

from __future__ import annotations

from uuid import uuid4

import pytest

from origin.ids import IdMint, mark_of, marks_of
from regions.topology import Topology, TopologyError, claims_thread

URLS = {"us-east": "http://a", "eu-west": "http://b", "ap-south": "http://c"}


def test_a_minted_id_names_the_region_that_minted_it() -> None:
    topology = Topology.of("eu-west", URLS)
    for region in URLS:
        assert topology.minted_by(IdMint(region).thread_id()) == region


def test_ids_of_others_name_nobody() -> None:
    topology = Topology.of("eu-west", URLS)
    for foreign in (str(uuid4()), "not an id", IdMint("mars").thread_id(), IdMint("eu-west").entry_id()):
        assert topology.minted_by(foreign) is None


def test_minted_ids_do_not_repeat() -> None:
    mint = IdMint("eu-west")
    assert len({mint.thread_id() for _ in range(20_000)}) == 20_000


def test_two_regions_with_one_mark_are_refused() -> None:
    seen: dict[int, str] = {}
    number = 0
    while (name := f"r{number}") and mark_of(name) not in seen:
        seen[mark_of(name)] = name
        number += 1
    with pytest.raises(ValueError, match="share the id mark"):
        marks_of([seen[mark_of(name)], name])


def test_a_region_outside_of_the_list_is_refused_by_name() -> None:
    with pytest.raises(TopologyError, match="mars"):
        Topology.of("mars", URLS)


def test_the_first_region_keeps_the_claims_in_256_threads() -> None:
    assert Topology.of("eu-west", URLS).claims_group == "us-east"
    names = {claims_thread(str(uuid4())) for _ in range(5_000)}
    assert names == {f"claims/{number:02x}" for number in range(256)}
