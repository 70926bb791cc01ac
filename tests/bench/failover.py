"""From the moment a holder falls silent to the first quorum write that another region takes for its threads.

Three `weft region` processes with 40 and 100 ms one way between them (delay proxies), `failover = "auto"`. Each turn
stops the holder's process (SIGSTOP: its connections stay open and nothing says that it is gone) and sends an append at
`X-Sync-Durability: quorum` to each of the other two every few milliseconds, each with an id of its own, until the first
is acknowledged. Beside it the configured silence. The two that are left are 200 ms of round trip apart: one is spent on
promises, one on the write itself. Then the holder goes on, and is promoted again for the next turn.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import aiohttp

from regions.operations import Promoted
from regions.operator import Operated, Operator, Place
from tests.bench import material
from tests.bench.harness import WEFT, Case, Context, Metric, Reading, Runner, Target
from tests.bench.servers import Region
from tests.bench.wan import FAR_S, FIRST, NEAR_S, distant_regions, spread_out

HEARTBEAT_S: Final = 0.25
AFTER_S: Final = 2.0
ROUND_TRIP_S: Final = 2 * FAR_S
"""Between the two regions that are left."""
PROBE_EVERY_S: Final = 0.01
PROBE_SECONDS_MAX: Final = 5.0
PROBES_BEGIN: Final = 0.9
"""Of the silence: before that none can be taken, and those that are sent on to the silent holder only wait."""
RECOVERED_SECONDS: Final = 60.0
SILENCE: Final = "the configured silence"
METRIC: Final = "silence → first quorum write"
SYNC: Final = f'failover = "auto"\nfailover_after_s = {AFTER_S}\nheartbeat_s = {HEARTBEAT_S}\n'


@asynccontextmanager
async def contestants(context: Context) -> AsyncGenerator[Mapping[str, Runner]]:
    folder = context.work / "regions"
    async with distant_regions(folder, sync=SYNC) as (started, links):
        cluster = Operated(tuple(Place(it.name, it.url) for it in started), folder / "peer.key")
        async with (
            Operator(cluster) as operator,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        ):
            [thread_id] = await started[0].create_threads(session, 1, 1)
            await started[0].drained(session)
            spread_out(links)
            await _settled(operator)
            numbers = itertools.count()

            async def silence() -> Reading:
                first, *others = started
                os.kill(first.pid, signal.SIGSTOP)
                began = time.perf_counter()
                try:
                    ended, at = await _first_write(session, others, thread_id, numbers, began)
                finally:
                    os.kill(first.pid, signal.SIGCONT)
                await _settled(operator)
                place = next(it for it in cluster.places if it.name == FIRST)
                asked = {"group": FIRST, "graceful": True}
                await operator.post(place, "/peer/promote", asked, Promoted, seconds_max=RECOVERED_SECONDS)
                await _settled(operator)
                return Reading({METRIC: (ended - began) * 1_000}, {"taken by": at})

            async def configured() -> Reading:
                return Reading({METRIC: AFTER_S * 1_000})

            yield {WEFT: silence, SILENCE: configured}


CASE: Final = Case(
    name="failover",
    what=f"a holder falls silent → first quorum write elsewhere, {NEAR_S * 1_000:g} and {FAR_S * 1_000:g} ms one way",
    metrics=(Metric(METRIC, "ms", Target(SILENCE, at_most=2 * ROUND_TRIP_S * 1_000, by="difference")),),
    contestants=contestants,
    notes=f"the target is two round trips of {ROUND_TRIP_S * 1_000:g} ms between the regions that are left; silence counts "
    f"from SIGSTOP, up to a heartbeat ({HEARTBEAT_S * 1_000:g} ms) after the last sign of life",
)


async def _first_write(
    session: aiohttp.ClientSession,
    others: Sequence[Region],
    thread_id: str,
    numbers: itertools.count[int],
    began: float,
) -> tuple[float, str]:
    """When the first append was acknowledged, and by which region."""
    await asyncio.sleep(AFTER_S * PROBES_BEGIN - (time.perf_counter() - began))
    done: asyncio.Future[tuple[float, str]] = asyncio.get_running_loop().create_future()

    async def probe(region: Region) -> None:
        headers = {**region.identity(material.principal(0)), "X-Sync-Durability": "quorum"}
        message = {"id": f"probe-{next(numbers)}", "role": "user", "content": "is anybody there"}
        url = f"{region.url}/api/threads/{thread_id}/messages"
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS_MAX)
        try:
            async with session.post(url, json={"messages": [message]}, headers=headers, timeout=timeout) as answer:
                if answer.status == 200 and not done.done():
                    done.set_result((time.perf_counter(), region.name))
        except (aiohttp.ClientError, TimeoutError):
            pass

    probes: set[asyncio.Task[None]] = set()
    try:
        async with asyncio.timeout(RECOVERED_SECONDS):
            while not done.done():
                probes |= {asyncio.create_task(probe(region)) for region in others}
                await asyncio.wait({done}, timeout=PROBE_EVERY_S)
        return done.result()
    finally:
        for task in probes:
            task.cancel()
        await asyncio.gather(*probes, return_exceptions=True)


async def _settled(operator: Operator) -> None:
    """Wait until all are ready, everything is everywhere, and the group's holder has its lease."""
    async with asyncio.timeout(RECOVERED_SECONDS):
        while True:
            statuses = [each.status for each in await operator.look() if each.status is not None and each.well]
            holders = {status.groups[FIRST].holder for status in statuses}
            if (
                len(statuses) == len(operator.cluster.places)
                and len(holders) == 1
                and sum(status.groups[FIRST].lease for status in statuses) == 1
                and not any(status.saved_entries or status.unrecovered for status in statuses)
                and not any(link.backlog_threads for status in statuses for link in status.peers.values())
            ):
                return
            await asyncio.sleep(0.05)
