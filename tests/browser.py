"""A real browser, without a screen: Debian's Chromium and its driver, spoken to through selenium."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCREENSHOTS = "LLMFP_SCREENSHOTS"
"""A folder where screenshots are kept, where it is set."""
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def missing() -> str | None:
    """What is not installed, or None."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


_HEAR = "window.heard = new Promise((done) => addEventListener('pointermove', () => done(), { once: true }))"
_TWO_FRAMES = "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))"


class Browser:
    """One window. Everything it loads and says is kept until asked for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1100, dark: bool = False, media: str = "screen") -> None:
        """Opens a file after the window has its size and its colours."""
        phone = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        self.drain()
        self.driver.get(path.as_uri())

    def drain(self) -> tuple[list[str], list[str]]:
        """What the console said, and every address that was asked for, since the last time."""
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return console, asked

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def centred(self, element: Any) -> list[float]:
        """Scrolls an element into the middle; its left, top, width and height there, once the page knows it scrolled:
        the scroll event, which hides what is said under the pointer, comes with the next frame."""
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        self._next_frame()
        box = "const b = arguments[0].getBoundingClientRect(); return [b.left, b.top, b.width, b.height]"
        return list(self.js(box, element))

    def hover(self, x: float, y: float) -> str:
        """Moves the pointer, and waits until the page has heard of it: what the page says there, "" where nothing."""
        self.js(_HEAR)
        moved = {"type": "mouseMoved", "x": x, "y": y, "pointerType": "mouse"}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", moved)
        self.driver.execute_async_script("heard.then(arguments[0])")
        return str(self.js("const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.textContent"))

    def _next_frame(self) -> None:
        """Returns when all that led to the next frame has been dispatched."""
        self.driver.execute_async_script(_TWO_FRAMES)

    def pdf(self) -> bytes:
        printed = self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})
        return base64.b64decode(printed["data"])

    def keep(self, name: str) -> None:
        """A screenshot of the whole page, where somebody asked for them."""
        if not (folder := os.environ.get(SCREENSHOTS)):
            return
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def started(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, which is closed again."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


CONTRAST = """
const luminance = (c) => {
  const part = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  return 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
};
const rgba = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const background = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const c = rgba(getComputedStyle(at).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const poor = [];
let seen = 0;
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const ink = luminance(rgba(element instanceof SVGElement ? style.fill : style.color));
  const paper = luminance(background(element));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  seen += 1;
  if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
}
return [seen, poor];
"""
"""WCAG 2.2's contrast of every text with what lies behind it: how many were seen, and those below 4.5."""
