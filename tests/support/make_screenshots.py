"""Makes the pictures of docs/report.md from real runs: `python tests/support/make_screenshots.py RUN RUN`.

Both run folders get their page; the first one's is shown alone, then both in comparison. Needs Chromium.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from page_browser import Browser
from PIL import Image

from trainer.report import write_report

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
MOST_BYTES = 200_000
TOP_OF = "return document.getElementById(arguments[0])?.getBoundingClientRect().top + scrollY - 8"


def save(name: str, *pictures: bytes) -> None:
    """Saves pictures side by side as one PNG of few colours."""
    opened = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    whole = Image.new(
        "RGB", (sum(p.width for p in opened) + 24 * (len(opened) - 1), max(p.height for p in opened)), "grey"
    )
    left = 0
    for picture in opened:
        whole.paste(picture, (left, 0))
        left += picture.width + 24
    IMAGES.mkdir(parents=True, exist_ok=True)
    file = IMAGES / f"{name}.png"
    whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size < MOST_BYTES, f"{file}: {file.stat().st_size} bytes"


def main(first: Path, second: Path) -> None:
    """Opens the pages and saves what is seen of them."""
    page = write_report([first])
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        browser.open(page)
        save("report-light", browser.picture(height=1500))
        browser.open(page, scheme="dark")
        save("report-dark", browser.picture(int(browser.run(TOP_OF, "ranks") or 1500), 1500))
        browser.open(page, 390)
        light = browser.picture(height=1200)
        browser.open(page, 390, "dark")
        save("report-phone", light, browser.picture(int(browser.run(TOP_OF, "time") or 1200), 1200))
        browser.open(write_report([first, second], Path(folder) / "comparison.html"))
        save("report-comparison", browser.picture(height=1500))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
