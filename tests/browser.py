"""Headless Chromium for tests that look at pages, driven over its debugging port; where it is missing they skip."""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    _CHROMIUM is None, reason="Debian's package chromium is not installed; .ci/run does not install it either"
)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
          "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
          "--remote-debugging-port=0", "--remote-allow-origins=*")  # fmt: skip
_MEASURE = """
(() => {
  const scrolls = (element) => {
    for (let e = element; e && e !== document.body; e = e.parentElement)
      if (/auto|scroll/.test(getComputedStyle(e).overflowX) && e.clientWidth < e.scrollWidth) return true;
    return false;
  };
  const name = (e) => e.tagName + ' ' + (e.textContent || '').trim().slice(0, 60);
  const wide = [], cut = [];
  for (const e of document.querySelectorAll('main *')) {
    const box = e.getBoundingClientRect();
    if (box.width && !scrolls(e) && (box.right > WIDTH + 1 || box.left < -1)) wide.push(name(e));
    const style = getComputedStyle(e);
    const spills = e.clientWidth && e.scrollWidth > e.clientWidth + 1 && !/auto|scroll/.test(style.overflowX);
    if (spills && !e.closest('.js-plotly-plot')) cut.push(name(e));
  }
  for (const text of document.querySelectorAll('svg.main-svg text')) {
    const box = text.getBoundingClientRect(), chart = text.closest('.js-plotly-plot').getBoundingClientRect();
    if (text.textContent && box.width && (box.left < chart.left - 2 || box.right > chart.right + 2
        || box.top < chart.top - 2 || box.bottom > chart.bottom + 2)) cut.push(name(text));
  }
  return {page: document.documentElement.scrollWidth, window: innerWidth, wide, cut,
          charts: document.querySelectorAll('.js-plotly-plot:has(.main-svg)').length,
          figures: document.querySelectorAll('figure').length};
})()
"""


def look(page: Path, width: int, picture: Path | None = None) -> dict[str, Any]:
    """Open a page at this width in CSS pixels.

    Args:
        picture: PNG file for a screenshot of the whole page.

    Returns:
        What `look_at` gives for this width.
    """
    return look_at(page, [width], picture)[0]


def look_at(page: Path, widths: list[int], picture: Path | None = None) -> list[dict[str, Any]]:
    """Open a page in a browser, at each width in a tab of its own.

    Args:
        picture: PNG file for a screenshot of the whole page, at the last width.

    Returns:
        For each width
        {page, window: widths; wide: elements that stick out of the window and cannot be scrolled to inside of the
        page; cut: texts that their box or chart cuts off; charts, figures: how many were drawn, of how many; console:
        what was logged; requests: addresses it asked for}.
    """
    assert _CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [_CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            return asyncio.run(_look(Path(profile), page, widths, picture))
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with its helpers, which would write into the profile
            process.wait()


def assert_fits(page: Path) -> None:
    """Assert that a page which needs no other file shows all of itself, and draws all of its charts, on a phone and on
    a desktop, and that nothing was logged."""
    widths, figures = [390, 1280], page.read_text().count("<figure>")
    assert figures
    for width, seen in zip(widths, look_at(page, widths), strict=True):
        assert (seen["window"], seen["page"], seen["charts"], seen["figures"]) == (width, width, figures, figures)
        assert (seen["wide"], seen["cut"], seen["console"]) == ([], [], [])
        asked = {url for url in seen["requests"] if not url.startswith("data:")}  # these are in the page
        assert asked == {page.resolve().as_uri()}


async def _look(profile: Path, page: Path, widths: list[int], picture: Path | None) -> list[dict[str, Any]]:
    started, port_file = time.monotonic(), profile / "DevToolsActivePort"
    while not port_file.exists() or not port_file.read_text().strip():
        assert time.monotonic() - started < 60, "Chromium did not start"
        await asyncio.sleep(0.05)
    port = port_file.read_text().split()[0]
    found = []
    async with aiohttp.ClientSession() as session:
        for width in widths:
            async with session.put(f"http://127.0.0.1:{port}/json/new") as answer:
                tab = await answer.json()
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                found.append(await _Tab(socket).measure(page, width, picture))
    return found


class _Tab:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._sent = socket, 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while (message := await self._socket.receive_json(timeout=60)).get("id") != self._sent:
            self.events.append(message)
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    async def measure(self, page: Path, width: int, picture: Path | None) -> dict[str, Any]:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(await self._socket.receive_json(timeout=60))
        await self.call("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 500))", awaitPromise=True)
        found = await self.call(
            "Runtime.evaluate", expression=_MEASURE.replace("WIDTH", str(width)), returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        if picture is not None:
            shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        told = [event for event in self.events if event["method"] in _TOLD]
        requests = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return found["result"]["value"] | {
            "console": [json.dumps(event["params"]) for event in told],
            "requests": requests,
        }


_TOLD = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
