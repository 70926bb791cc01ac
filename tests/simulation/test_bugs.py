"""The simulation finds every planted bug: with a safety rule switched off, some seed breaks a promise.

`make simulate BUG=name` looks for one by hand.
"""

from __future__ import annotations

import pytest

from tests.simulation.bugs import BUGS, hunt, planted
from tests.simulation.schedule import run
from tests.simulation.scripted import play
from tests.simulation.scripted_bugs import SCRIPTED


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_planted_bug_is_found(name: str) -> None:
    found = hunt(BUGS[name])
    assert found is not None, f"{BUGS[name].rule} Nobody noticed in {BUGS[name].seeds_max} schedules."
    seed, result = found
    assert run(BUGS[name].schedule(seed)).violations == [], "what was found is there without the bug, too"
    print(f"{name}: seed {seed}: {result.violations[0]}")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", sorted(SCRIPTED))
def test_a_planted_bug_is_shown_by_its_script(name: str, seed: int) -> None:
    """The script passes while the rule stands, so what it shows without is the rule's doing."""
    bug = SCRIPTED[name]
    play(bug.script, seed=seed)
    with planted(bug), pytest.raises(AssertionError, match="acknowledged at quorum, and"):
        play(bug.script, seed=seed)


def test_there_are_enough_planted_bugs() -> None:
    assert len(BUGS) >= 20
    assert len({bug.rule for bug in BUGS.values()}) == len(BUGS)


@pytest.mark.parametrize("name", ["no_dedupe", "claims_at_region"])
def test_easy_bugs_are_found_at_once(name: str) -> None:
    found = hunt(BUGS[name])
    assert found is not None and found[0] <= 20
