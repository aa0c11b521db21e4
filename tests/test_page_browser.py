"""The report in a real browser: it draws, fits a phone, obeys the keyboard, asks nobody for anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import fixtures_measurements as fixtures

from bitport.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECTIONS = [
    *("comparison", "accuracy", "latency", "sizes", "layers", "ranges"),
    *("network", "integers", "parity", "tried", "origin"),
]
CHARTS = [f"chart-{name}" for name in ("accuracy", "latency", "sizes", "layers", "weights", "activations")]
# One page with a frame for each report, asked when all have drawn; answers as JSON in its own text.
FRAMES = """<!doctype html>{frames}
<script>
const ask = (frame) => {{
  const d = frame.contentDocument, e = d.documentElement, w = frame.contentWindow;
  const seen = (x) => {{ const r = x.getBoundingClientRect(); return r.height > 0 && r.width > 0; }};
  const all = (selector) => [...d.querySelectorAll(selector)];
  const boxes = all(".network .box");
  const told = d.getElementById("told"), select = d.querySelector("select");
  const found = {{
    overflow: e.scrollWidth - e.clientWidth,
    charts: e.dataset.charts || null,
    sections: all("section").filter((s) => seen(s) && s.innerText.trim().length > 40).map((s) => s.id),
    drawn: all(".chart").filter((c) => c.querySelector(".main-svg .trace, .main-svg .points")).map((c) => c.id),
    wide: all(".chart .main-svg").filter((c) => c.getBoundingClientRect().right > e.clientWidth + 1).length,
    requests: w.performance.getEntriesByType("resource").map((r) => r.name),
    boxes: boxes.length,
    buttons: [...new Set(all(".modebar-btn").map((b) => b.dataset.title || b.getAttribute("aria-label")))],
    background: w.getComputedStyle(d.body).backgroundColor,
    stops: boxes.filter((b) => b.getAttribute("tabindex") === "0").length,
  }};
  const folded = () => all("details").map((one) => one.open);
  const before = folded();
  w.dispatchEvent(new w.Event("beforeprint"));
  found.paper = folded();
  w.dispatchEvent(new w.Event("afterprint"));
  found.folded = [before, folded()];
  if (boxes.length) {{
    boxes[0].focus();
    boxes[0].dispatchEvent(new w.KeyboardEvent("keydown", {{ key: "ArrowDown", bubbles: true }}));
    found.focus = boxes.indexOf(d.activeElement);
    found.told = told.textContent === boxes[1].querySelector("title").textContent;
  }}
  if (select) {{
    const text = d.getElementById(select.dataset.text), before = text.textContent;
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    select.dispatchEvent(new w.Event("change"));
    found.picked = [before, text.textContent];
    const button = d.querySelector("button[data-tensor]");
    button.click();
    found.shown = d.activeElement.value === button.dataset.tensor;
    const bars = d.getElementById("chart-activations").data[0];
    found.cut = bars.marker.color.filter((c) => c !== bars.marker.color[20]).length;
  }}
  return found;
}};
onload = () => setTimeout(() => {{
  const found = [...document.querySelectorAll("iframe")].map(ask);
  document.body.innerHTML = "<pre></pre>";
  document.body.firstChild.textContent = JSON.stringify(found);
}}, 1500);
</script>"""


def browse(folder: Path, reports: Mapping[Path, int], *flags: str) -> tuple[list[dict[str, Any]], str]:
    """Open reports in frames of a width; returns (what each frame answers, the browser's log)."""
    if CHROMIUM is None:
        reason = "Chromium is not installed: the report can't be looked at in a browser"
        if os.environ.get("BITPORT_CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    frames = "".join(
        f'<iframe src="{path.as_uri()}" style="border:0;width:{width}px;height:3000px"></iframe>'
        for path, width in reports.items()
    )
    page = folder / "frames.html"
    page.write_text(FRAMES.format(frames=frames), encoding="utf-8")
    given = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr "
        "--allow-file-access-from-files --virtual-time-budget=20000 --window-size=1300,1000 --dump-dom"
    )
    done = subprocess.run(
        [CHROMIUM, *given.split(), *flags, f"--user-data-dir={folder / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<pre>(\[.*?\])</pre>", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[:500] + done.stderr[-2000:]
    parsed: list[dict[str, Any]] = json.loads(
        found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    )
    return parsed, done.stderr


def nothing_deployed() -> dict[str, Any]:
    """What a target that only simulates leaves without a value."""
    why = "null is a simulation: nothing was deployed"
    return {
        "latency": None,
        "latency_reason": why,
        "size": None,
        "size_reason": why,
        "memory": {},
        "verdict": None,
    }


@pytest.mark.browser
def test_it_draws_fits_a_phone_and_obeys_the_keyboard(tmp_path: Path) -> None:
    reports = {
        render(fixtures.write(tmp_path / "phone")): 360,
        render(fixtures.write(tmp_path / "desk")): 1200,
        render(fixtures.write(tmp_path / "null", **nothing_deployed())): 360,
        render(fixtures.write(tmp_path / "old", distributions=None, network=None, tried=None)): 360,
    }
    (phone, desk, null, old), log = browse(
        tmp_path, reports, "--blink-settings=preferredColorScheme=1,primaryHoverType=2,availableHoverTypes=2"
    )
    assert "CONSOLE" not in log
    for found in (phone, desk, null, old):
        assert found["charts"] == "drawn"
        assert found["overflow"] <= 0 and found["wide"] == 0
        assert found["requests"] == []
        # none that sends the chart to a web service
        assert set(found["buttons"]) <= {"Download plot as a PNG", "Reset axes"}
        # paper shows what a click would
        assert found["paper"] and all(found["paper"])
        before, after = found["folded"]
        assert before == after and not any(after)
    assert desk["buttons"]
    for found in (phone, desk):
        assert found["sections"] == SECTIONS
        assert found["drawn"] == CHARTS
        assert found["boxes"] == len(fixtures.layers()) + 2 and found["stops"] == 1
        assert found["focus"] == 1 and found["told"]
        before, after = found["picked"]
        assert before != after and "values clipped" in after
        assert found["shown"]
        assert found["cut"] == 5  # the bars to the right of the range have another colour
    assert null["drawn"] == [name for name in CHARTS if name != "chart-latency"]
    assert old["drawn"] == [name for name in CHARTS if name not in ("chart-weights", "chart-activations")]
    assert old["boxes"] == 0


@pytest.mark.browser
def test_it_is_dark_where_the_reader_is(tmp_path: Path) -> None:
    report = render(fixtures.write(tmp_path / "a"))
    (found,), log = browse(tmp_path, {report: 800}, "--blink-settings=preferredColorScheme=0")
    assert "CONSOLE" not in log
    red, green, blue = map(int, re.findall(r"\d+", found["background"]))
    assert max(red, green, blue) < 60
    assert found["drawn"] == CHARTS
