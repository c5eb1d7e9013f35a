"""A page as a browser lays it out: headless Chromium, where it is installed."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import HANG

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no browser: install one of {', '.join(NAMES)} to look at the pages"
)

# A frame of each page and width, and what its parent measures of it. A page of ours runs no script.
HARNESS = """<!DOCTYPE html>
<meta charset="utf-8">
<body>
{frames}
<script>
const excess = element => element.scrollWidth - element.clientWidth;
onload = () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument;
    return {{
      page: excess(page.documentElement),
      boxes: Math.max(0, ...[...page.querySelectorAll(".wide")].map(excess)),
      height: page.documentElement.scrollHeight,
    }};
  }});
  document.body.textContent = "found" + JSON.stringify(found) + "end";
}};
</script>
"""


class Layout(NamedTuple):
    """Of a page at one width, in pixels.

    page: how far it reaches beyond the window. boxes: the same of what scrolls in its own box, at
    worst. height: of the whole page.
    """

    page: int
    boxes: int
    height: int


def chromium(folder: str, *options: str) -> str:
    """What a headless Chromium prints, with its profile in this folder."""
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--user-data-dir={folder}/profile", *options]
    return subprocess.run(words, capture_output=True, text=True, timeout=HANG, check=True).stdout


def layouts(views: list[tuple[Path, int]]) -> list[Layout]:
    """The layout of each (page, width in pixels), by one start of the browser."""
    frames = []
    for page, width in views:
        text = html.escape(page.read_text("utf-8"))
        frames.append(f'<iframe width="{width}" height="900" frameborder="0" srcdoc="{text}">')
        frames.append("</iframe>")
    with tempfile.TemporaryDirectory() as folder:
        harness = Path(folder) / "harness.html"
        harness.write_text(HARNESS.format(frames="\n".join(frames)), "utf-8")
        dom = chromium(folder, "--virtual-time-budget=60000", "--dump-dom", harness.as_uri())
    found = re.search(r"found(\[.*?\])end", dom)
    assert found, f"the browser measured nothing: {dom[-500:]}"
    return [Layout(**one) for one in json.loads(found[1])]


def overflow(page: Path, width: int) -> int:
    """How many pixels a page reaches beyond a window of this width."""
    return layouts([(page, width)])[0].page


def screenshot(page: Path, width: int, out: Path) -> None:
    """The whole page at this width, as a PNG."""
    height = layouts([(page, width)])[0].height
    with tempfile.TemporaryDirectory() as folder:
        shot = f"--screenshot={out.absolute()}"
        chromium(folder, shot, f"--window-size={width},{height}", page.absolute().as_uri())
