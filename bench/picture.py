"""The picture of a report in README (`make picture`): two places of the page, side by side. Needs Chromium."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, SCALE = 960, 1640, 0.72
MOST_BYTES = 300_000
PAGE = """<!doctype html><style>body {{ margin: 0; background: #d9dde3; display: flex; gap: 12px }}
iframe {{ border: 0; width: {width}px; height: {height}px; background: white }}</style>
<iframe src="{url}"></iframe><iframe src="{url}#ranges"></iframe>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="report.html of an artifact")
    parser.add_argument("picture", type=Path, help="where the PNG goes")
    given = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("Chromium is not installed: a picture needs it")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        page, shot = folder / "page.html", folder / "shot.png"
        page.write_text(PAGE.format(url=given.report.resolve().as_uri(), width=WIDTH, height=HEIGHT))
        flags = (
            "--headless --no-sandbox --disable-gpu --hide-scrollbars --allow-file-access-from-files "
            "--virtual-time-budget=15000 --blink-settings=preferredColorScheme=1"
        )
        window = f"--window-size={2 * WIDTH + 12},{HEIGHT}"
        command = [
            browser,
            *flags.split(),
            window,
            f"--screenshot={shot}",
            f"--user-data-dir={folder / 'profile'}",
        ]
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(shot) as image:
            size = (round(image.width * SCALE), round(image.height * SCALE))
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    few = small.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(given.picture, optimize=True)
    taken = given.picture.stat().st_size
    if taken > MOST_BYTES:
        sys.exit(f"{given.picture} takes {taken:,} bytes, more than {MOST_BYTES:,}: lower SCALE")


if __name__ == "__main__":
    main()
