"""A real headless Chromium, driven by the DevTools protocol over one websocket.

`browser()` starts one with a profile of its own; `Browser.page()` opens a tab in a context of its own (storage, cache)
that remembers what went wrong in it: console errors, uncaught exceptions, violations of the content policy, requests
that failed or were answered with an error. Waiting is for conditions, with a deadline.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp

from tests.support.npm import missing

NAMES = ("chromium", "chromium-browser", "google-chrome")
START_S = 60.0
WAIT_S = 20.0
OPTIONS = (
    "--headless=new", "--disable-gpu", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio", "--remote-debugging-port=0",
    "--host-resolver-rules=MAP *.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
KEYS = {"Enter": ("Enter", "\r", 13), "Escape": ("Escape", "", 27), "Tab": ("Tab", "", 9), "End": ("End", "", 35),
        "ArrowDown": ("ArrowDown", "", 40), "ArrowUp": ("ArrowUp", "", 38)}  # fmt: skip


def executable() -> str:
    """Where Chromium is; a test that needs it is left out, or fails, where it is not."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    missing("Chromium is not installed (Debian: apt-get install chromium)")


class ScriptError(AssertionError):
    """What was evaluated in a page threw."""


@dataclass
class Page:
    """A tab. `trouble` is what went wrong in it, in order; tests expect it to be empty."""

    browser: Browser
    context: str
    session: str
    trouble: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    responses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Status and headers of the last answer of each address."""
    _answer: dict[str, Any] | None = None

    async def send(self, method: str, **params: Any) -> Any:
        return await self.browser.send(method, params, self.session)

    async def goto(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete'", what=f"{url} is loaded")

    async def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )

    async def prefer(self, **features: str) -> None:
        """Media features: `prefers_color_scheme="dark"`."""
        found = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.send("Emulation.setEmulatedMedia", features=found)

    async def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise ScriptError(f"{script[:200]}: {json.dumps(answer['exceptionDetails'])[:800]}")
        return answer["result"].get("value")

    async def wait(self, condition: str, *, what: str = "", seconds: float = WAIT_S) -> Any:
        """Until the expression is true; its value, or True for an element."""
        condition = f"Promise.resolve({condition}).then((found) => found instanceof Node || found)"
        deadline = monotonic() + seconds
        while True:
            found = None
            with suppress(ScriptError):
                found = await self.evaluate(condition)
            if found:
                return found
            if monotonic() > deadline:
                text = await self.evaluate("document.body?.innerText.slice(0, 1500)")
                raise AssertionError(
                    f"not within {seconds:g} s: {what or condition}\ntrouble: {self.trouble}\nthe page says: {text}"
                )
            await asyncio.sleep(0.03)

    async def text(self, selector: str = "body") -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def count(self, selector: str) -> int:
        return int(await self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length"))

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element."""
        box = await self.wait(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            "return b.width ? [b.x + b.width / 2, b.y + b.height / 2] : null; })()",
            what=f"{selector} is there",
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        name, text, code = KEYS[key] if key in KEYS else (key, key, ord(key.upper()))
        event = {"key": name, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        await self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    async def screenshot(self, path: Path) -> None:
        shot = await self.send("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def offline(self, yes: bool) -> None:
        await self.send(
            "Network.emulateNetworkConditions", offline=yes, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )

    async def fulfil(self, pattern: str | None, body: str = "", kind: str = "text/plain", *, status: int = 200) -> None:
        """Answer what is asked for at `pattern` from here; None: let everything through again, what is held too."""
        if pattern is None:
            self._answer = None
            await self.send("Fetch.disable")
            return
        headers = [{"name": "Content-Type", "value": kind}]
        encoded = base64.b64encode(body.encode()).decode()
        self._answer = {"responseCode": status, "responseHeaders": headers, "body": encoded}
        await self.send("Fetch.enable", patterns=[{"urlPattern": pattern}])

    async def hold(self, pattern: str) -> None:
        """Leave what is asked for at `pattern` without an answer, until `fulfil(None)`."""
        self._answer = None
        await self.send("Fetch.enable", patterns=[{"urlPattern": pattern}])

    def hear(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                said = [str(arg.get("value", arg.get("description", ""))) for arg in params["args"]]
                self.trouble.append(f"console.{params['type']}: {' '.join(said)}")
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                thrown = details.get("exception", {}).get("description", "")
                self.trouble.append(f"exception: {details.get('text')} {thrown}")
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                entry = params["entry"]
                self.trouble.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")
            case "Audits.issueAdded" if params["issue"]["code"] == "ContentSecurityPolicyIssue":
                self.trouble.append(f"policy: {json.dumps(params['issue']['details'])}")
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])
            case "Network.responseReceived":
                answer = params["response"]
                headers = {name.lower(): value for name, value in answer["headers"].items()}
                self.responses[answer["url"]] = (answer["status"], headers)
            case "Fetch.requestPaused" if self._answer is not None:
                self.browser.later(self.send("Fetch.fulfillRequest", requestId=params["requestId"], **self._answer))
            case "Page.javascriptDialogOpening":
                self.trouble.append(f"dialog: {params['message']}")
                dismiss = self.send("Page.handleJavaScriptDialog", accept=False)
                self.browser.later(dismiss)
            case _:
                pass


class Browser:
    """A Chromium under way."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._pages: dict[str, Page] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def later(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def listen(self) -> None:
        async for message in self._socket:
            found = json.loads(message.data)
            if "id" in found:
                asked = self._asked.pop(found["id"], None)
                if asked is not None and not asked.done():
                    if "error" in found:
                        asked.set_exception(AssertionError(f"Chromium: {found['error']}"))
                    else:
                        asked.set_result(found["result"])
            elif (page := self._pages.get(found.get("sessionId", ""))) is not None:
                page.hear(found["method"], found["params"])
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(AssertionError("Chromium is gone"))

    async def send(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> Any:
        self._number += 1
        asked = self._asked[self._number] = asyncio.get_running_loop().create_future()
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params or {}}
        if session is not None:
            message["sessionId"] = session
        await self._socket.send_str(json.dumps(message))
        async with asyncio.timeout(START_S):
            return await asked

    @asynccontextmanager
    async def page(self, *, width: int = 1280, height: int = 800, phone: bool = False) -> AsyncIterator[Page]:
        """A tab that shares nothing with the others."""
        context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        created = await self.send("Target.createTarget", {"url": "about:blank", "browserContextId": context})
        target = created["targetId"]
        attached = await self.send("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = self._pages[attached["sessionId"]] = Page(self, context, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            await page.send(f"{domain}.enable")
        await page.resize(width, height, phone=phone)
        try:
            yield page
        finally:
            with suppress(AssertionError):
                await self.send("Target.disposeBrowserContext", {"browserContextId": context})
            del self._pages[page.session]


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A Chromium of one's own until the block ends."""
    found = executable()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            found, *OPTIONS, *(("--no-sandbox",) if os.geteuid() == 0 else ()), f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            url = await _address(Path(profile) / "DevToolsActivePort", process)
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(url, max_msg_size=0, autoclose=True) as socket,
            ):
                running = Browser(socket)
                listening = asyncio.create_task(running.listen())
                try:
                    yield running
                finally:
                    listening.cancel()
                    with suppress(asyncio.CancelledError):
                        await listening
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _address(port_file: Path, process: asyncio.subprocess.Process) -> str:
    deadline = monotonic() + START_S
    while True:
        with suppress(OSError, ValueError):
            port, path = port_file.read_text().split("\n")[:2]
            return f"ws://127.0.0.1:{int(port)}{path}"
        if process.returncode is not None:
            raise AssertionError(f"Chromium ended with {process.returncode} before it was ready")
        if monotonic() > deadline:
            raise AssertionError("Chromium was not ready in time")
        await asyncio.sleep(0.05)
