"""Three region servers with the distance of three continents between them, by delay proxies.

Promise: every ordered pair of regions has a link of its own (`tests.support.linkproxy`), delayed on both ways by what
`ONE_WAY_S` says, or throttled, or cut, as a case wants; the writing region is the first. Left to others: what is
measured.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from tests.bench.material import REGIONS
from tests.bench.servers import Region, regions
from tests.support.linkproxy import LinkProxy, link_proxy

NEAR_S: Final = 0.040
FAR_S: Final = 0.100
FIRST, NEAR, FAR = REGIONS
ONE_WAY_S: Final = {frozenset((FIRST, NEAR)): NEAR_S, frozenset((FIRST, FAR)): FAR_S, frozenset((NEAR, FAR)): FAR_S}


@asynccontextmanager
async def distant_regions(folder: Path, *, sync: str = "") -> AsyncGenerator[tuple[list[Region], LinkProxy]]:
    """Regions that are acquainted over links without faults, and the links, named "from>to"."""
    ports = dict(zip(REGIONS(len(REGIONS)), strict=True))
    targets = {f"{a}>{b}": ("127.0.0.1", ports[b]) for a in REGIONS for b in REGIONS if a != b}
    with ExitStack() as stack:
        links = stack.enter_context(link_proxy(targets))
        through = {a: {b: f"http://127.0.0.1:{links.ports[f'{a}>{b}']}" for b in REGIONS if a != b} for a in REGIONS}
        async with regions(folder, through=through, ports=ports, sync=sync) as started:
            yield started, links


def spread_out(links: LinkProxy) -> None:
    """Put the oceans between the regions."""
    links.change_many(
        [
            (f"{a}>{b}", ("out", "back"), {"delay_s": ONE_WAY_S[frozenset((a, b))]})
            for a in REGIONS
            for b in REGIONS
            if a != b
        ]
    )
