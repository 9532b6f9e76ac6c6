"""How does a page look? Pictures of it for people, by a headless Chromium: wide and narrow, light and dark.

::

    python -m tests.screenshots studies/NAME/report.html shots

Writes shots/1280-light.png, 1280-dark.png, 390-light.png and 390-dark.png, each of the whole page.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

WIDTHS = (1280, 390)  # a laptop's, a phone's


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts the system's Chromium (Debian: apt-get install chromium)."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"],  # its sandbox cannot be had by root
        )
        yield browser
        browser.close()


def shoot(page_file: Path, out: Path) -> list[Path]:
    """Writes the pictures of one page; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with chromium() as browser:
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.goto(page_file.absolute().as_uri())
                files.append(out / f"{width}-{scheme}.png")
                page.screenshot(path=files[-1], full_page=True)
                page.close()
    return files


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file():
        print(
            "error: give a page and a folder: python -m tests.screenshots report.html shots", file=sys.stderr
        )
        sys.exit(2)
    print(*shoot(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
