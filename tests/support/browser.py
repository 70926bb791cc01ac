"""A headless Chromium, driven by its own protocol over a WebSocket: what a page logs, loads and becomes."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.npm import missing
from tests.support.ports import free_port

DEADLINE_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Tab:
    """One page. `errors` are what a person would find in the console, refused and failed loads among them."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        """Status and headers by URL."""
        self._socket = socket
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())
        self._urls: dict[str, str] = {}

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = len(self._waiting) + 1
        self._waiting[number] = future = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(DEADLINE_S):
            return await future

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page; a promise is waited for."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until `expression` is true in the page."""
        loop = asyncio.get_running_loop()
        end = loop.time() + DEADLINE_S
        while not await self.value(f"Boolean({expression})"):
            assert loop.time() < end, f"never true in the page: {expression}; {self.errors}"
            await asyncio.sleep(0.05)

    async def screenshot(self, path: Path) -> None:
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    async def close(self) -> None:
        self._reader.cancel()
        await self._socket.close()

    async def _read(self) -> None:
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                future = self._waiting[told["id"]]
                if "error" in told:
                    future.set_exception(AssertionError(told["error"]))
                else:
                    future.set_result(told["result"])
            else:
                self._note(told["method"], told["params"])

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(f"{told['type']}: {[item.get('value', item) for item in told['args']]}")
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self._urls[told["requestId"]] = told["request"]["url"]
        elif method == "Network.responseReceived":
            self.answers[told["response"]["url"]] = (told["response"]["status"], told["response"]["headers"])
        elif method == "Network.loadingFailed":
            self.errors.append(f"{told['errorText']} {self._urls.get(told['requestId'], '')}")


@asynccontextmanager
async def browser(folder: Path) -> AsyncGenerator[Browser]:
    """A running Chromium whose profile is in `folder`; skipped, or failed, where there is none."""
    binary = next((found for name in NAMES if (found := shutil.which(name))), None)
    if binary is None:
        missing("chromium is not installed")
    assert binary is not None
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(binary, "--headless=new", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"),
        *(
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-default-browser-check",
        ),
        *(f"--remote-debugging-port={port}", f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900"),
        *(("--no-sandbox",) if os.geteuid() == 0 else ()),
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with aiohttp.ClientSession() as session:
            yield Browser(session, port)
    finally:
        process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class Browser:
    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._session = session
        self._url = f"http://127.0.0.1:{port}"

    @asynccontextmanager
    async def tab(self) -> AsyncGenerator[Tab]:
        """A new page."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    async with self._session.put(f"{self._url}/json/new?about:blank") as answer:
                        place = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
                        break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.05)
        socket = await self._session.ws_connect(place, max_msg_size=0)
        tab = Tab(socket)
        try:
            yield tab
        finally:
            await tab.close()
