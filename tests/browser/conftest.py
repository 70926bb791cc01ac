"""One cluster of one region for all, one Chromium for the tests of a module, readers of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.support.chromium import Browser, Page, browser, executable
from tests.support.outside import Outside, User
from tests.support.processes import RunningCluster, running_cluster

DESKTOP = (1280, 800, False)
PHONE = (360, 740, True)
REGION = "us-east"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    executable()  # nothing is started where there is no Chromium
    data = tmp_path_factory.mktemp("cluster") / "data"
    with running_cluster(data, "--regions", REGION, "--no-samples") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browser() as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def outside(cluster: RunningCluster) -> AsyncIterator[Outside]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield Outside(cluster, session)


@dataclass
class Console:
    """The console in tabs of its own."""

    chromium: Browser
    outside: Outside

    @property
    def url(self) -> str:
        return self.outside.edge(REGION)

    @asynccontextmanager
    async def tab(self, size: tuple[int, int, bool] = DESKTOP) -> AsyncIterator[Page]:
        """A tab; at its end nothing may have gone wrong in it that the test did not take note of."""
        width, height, phone = size
        async with self.chromium.page(width=width, height=height, phone=phone) as page:
            yield page
            assert page.trouble == []
            strangers = [url for url in page.requested if not url.startswith((self.url, "blob:" + self.url))]
            assert strangers == []

    async def sign_in(self, page: Page, user: User, place: str = "") -> None:
        """By the form, as anybody would."""
        await page.goto(f"{self.url}/{place}")
        await page.wait("document.activeElement.id === 'token'", what="the form asks for the token")
        await page.type(user.token)
        await page.press("Enter")
        await page.wait("document.querySelector('.shell')", what="signed in")

    async def enter(self, page: Page, user: User, place: str = "") -> None:
        """By the link that `weft up` prints, and on to `place`."""
        await page.goto(f"{self.url}/#token={user.token}")
        await page.wait("document.querySelector('.shell')", what="signed in")
        if place:
            await page.evaluate(f"location.hash = {place!r}")


@pytest.fixture
def console(chromium: Browser, outside: Outside) -> Console:
    return Console(chromium, outside)


def said(text: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "role": role, "content": text, **more}
