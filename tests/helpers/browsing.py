"""A headless Chromium for tests of the page, and what it is asked about a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, sync_playwright

# The bytes of one frame as a browser shows it, in 16 x 16 pixels.
_PIXELS = """(media) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 16;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(media, 0, 0, 16, 16);
  return Array.from(context.getImageData(0, 0, 16, 16).data);
}"""

# Every text that can be seen, with its contrast to what is behind it: the colours of all that it lies in, from the root on;
# for the label of a picture, over white and over black, as any picture may be behind it.
_CONTRASTS = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const behind = (element, start) => {
    const line = [];
    for (let one = element; one; one = one.parentElement) line.unshift(parse(getComputedStyle(one).backgroundColor));
    return line.reduce((below, top) => over(top, below), start);
  };
  const found = [];
  const look = (element, text, colour) => {
    const beside = element.parentElement?.querySelector(":scope > video, :scope > img");
    const from = beside && element.matches(".score") ? [[255, 255, 255], [0, 0, 0]] : [null];
    for (const start of from) {
      const back = start ? over(parse(getComputedStyle(element).backgroundColor), start) : behind(element, [255, 255, 255]);
      const name = element.tagName + "." + element.className;
      found.push([contrast(over(parse(colour), back), back), text.trim().slice(0, 40), name]);
    }
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.checkVisibility() || element.closest(".unseen, :disabled")) continue;
    look(element, walk.currentNode.data, getComputedStyle(element).color);
  }
  for (const element of document.querySelectorAll("input, textarea, select")) {
    if (!element.checkVisibility() || element.matches(".unseen, :disabled")) continue;
    look(element, element.value || "value", getComputedStyle(element).color);
    if (element.placeholder) look(element, element.placeholder, getComputedStyle(element, "::placeholder").color);
  }
  return found;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test where no Chromium is installed."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, *allowed: str, **options: Any) -> Iterator[Page]:
    """The page at `url` in a window of its own. At the end nothing may stand in the console but texts with one of `allowed`."""
    with browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)) as context:
        said: list[str] = []

        def heard(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                said.append(f"{message.text} {message.location['url']}")

        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.set_default_timeout(20_000)
        page.goto(url)
        yield page
        allowed = (*allowed, "/preview?step=")  # of a job that ended while its preview was asked for
        wrong = [text for text in said if not any(part in text for part in allowed)]
        assert not wrong, wrong  # pytest does not show the values of a helper


def pixels(media: Locator) -> list[int]:
    """What a video shows now: 16 x 16 pixels, RGBA."""
    shown: list[int] = media.evaluate(_PIXELS)
    return shown


def moves(page: Page, video: Locator, seconds: float = 5.0) -> bool:
    """Whether what a video shows changes, visibly: by more than 30 of 255 in some pixel."""
    first = pixels(video)
    for _ in range(int(seconds / 0.1)):
        page.wait_for_timeout(100)
        if max(abs(a - b) for a, b in zip(first, pixels(video), strict=True)) > 30:
            return True
    return False


def contrasts(page: Page) -> list[tuple[float, str, str]]:
    """(contrast, text, element) of every text that can be seen, by WCAG's formula."""
    found: list[tuple[float, str, str]] = page.evaluate(_CONTRASTS)
    return found


def unlabelled(page: Page) -> list[str]:
    """Controls without a name for those who do not see them."""
    controls = page.locator("button, input, textarea, select, summary, progress, a[href]")
    lines = []
    for control in controls.all():
        snapshot = control.aria_snapshot() if control.is_visible() else '"hidden"'
        if '"' not in snapshot.split("\n")[0] and "summary" not in str(control.evaluate("e => e.localName")):
            lines.append(str(control.evaluate("e => e.outerHTML.slice(0, 200)")))
    return lines
