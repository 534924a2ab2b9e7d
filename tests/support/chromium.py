"""Debian's Chromium without a screen: what a page looks like, and what becomes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.patience import patient

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr",
)
DARK = "--blink-settings=preferredColorScheme=0"
_MEASURE = """<script>
const root = document.documentElement;
parent.postMessage({
  wide: root.scrollWidth,
  window: window.innerWidth,
  bars: [...document.querySelectorAll("svg.line rect:not(.ground)")].filter(
    bar => bar.getBoundingClientRect().width > 0).length,
  rows: [...document.querySelectorAll("tbody tr")].filter(
    row => row.getBoundingClientRect().height > 10).length,
  back: getComputedStyle(document.body).backgroundColor,
}, "*");
</script></body>"""
_FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<style>body {{ margin: 0 }} iframe {{ width: {width}px; height: {height}px; border: 0;
display: block }}</style>
<script>addEventListener("message", found => Object.assign(
document.documentElement.dataset, found.data));</script>
<iframe src="{name}"></iframe>"""
"""A page around the page, because no window of Chromium is narrower than 500 pixels."""


def run(page: Path, width: int, height: int, *flags: str) -> tuple[str, list[str]]:
    """Show ``page``; return what Chromium printed, and the messages of the page's console."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("chromium is not installed: apt-get install chromium")
    profile = page.parent / f"profile-{width}"
    done = subprocess.run(
        [program, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", *flags,
         page.as_uri()],
        capture_output=True, text=True, check=False, timeout=patient(60),
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def framed(page: Path, width: int, height: int) -> Path:
    """Return a page that shows ``page`` in a frame of this size."""
    frame = page.with_name(f"frame-{width}-{page.name}")
    frame.write_text(_FRAME.format(width=width, height=height, name=page.name), encoding="utf-8")
    return frame


def screenshot(page: Path, picture: Path, width: int, height: int, *flags: str) -> list[str]:
    """Make a PNG of ``page``; return the messages of the page's console."""
    frame = framed(page, width, height)
    _, messages = run(frame, width, height, f"--screenshot={picture}", *flags)
    assert picture.read_bytes().startswith(b"\x89PNG")
    return messages


def measured(page: Path, width: int, *flags: str) -> dict[str, str]:
    """Return facts about ``page`` laid out ``width`` pixels wide.

    They are found by a script in a copy of the page, whose own policy would forbid that.
    """
    text = page.read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv[^>]*>", text)
    assert policy is not None
    copy = page.with_name(f"copy-{page.name}")
    copy.write_text(text.replace(policy[0], "").replace("</body>", _MEASURE), encoding="utf-8")
    document, _ = run(framed(copy, width, 2000), 1400, 2000, "--dump-dom", *flags)
    root = re.search(r"<html[^>]*>", document)
    assert root is not None, document[:1000]
    return dict(re.findall(r'data-(\w+)="([^"]*)"', root[0]))
