"""The report page in a real browser: what has to be seen is seen, and the keys work."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

from opd_ray.report.html import write_report
from tests.report.run_folders import MODELS, TASKS, write_run, write_samples

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
ROWS = 2 * len(TASKS)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo")


def ask(run, script: str, width: int, fragment: str = "") -> object:
    """What ``script`` gives to ``tell`` in the loaded page, whose own policy stays in force.

    The page is in a frame, because a window is never narrower than 500 pixels.
    """
    script = f"""
    const tell = (x) => parent.postMessage(JSON.stringify(x), "*");
    addEventListener("load", () => setTimeout(() => {{ {script} }}, 100));
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = write_report(run).read_text(encoding="utf-8")
    text = text.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    (run / "probed.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    (run / "frame.html").write_text(
        f'<iframe src="probed.html{fragment}" width="{width}" height="800" frameborder="0"></iframe><script>'
        'addEventListener("message", (e) => document.body.append("<" + e.data + ">"));</script>'
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={run.parent / 'browser'}"]
    flags += ["--window-size=1600,900", "--virtual-time-budget=5000", "--dump-dom"]
    page = (run / "frame.html").as_uri()
    done = subprocess.run([BROWSER, *flags, page], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(re.findall("&lt;(.*)&gt;", done.stdout)[0])


@pytest.mark.parametrize("size", [32, 512])
@pytest.mark.parametrize("width", [390, 1000])
def test_every_models_pictures_are_seen_without_scrolling_sideways(run, width, size):
    write_samples(run / "samples", size=size)
    script = """
    const edges = [...document.querySelectorAll(".pictures img")].map((i) => i.getBoundingClientRect());
    const box = document.querySelector(".pictures").parentElement;
    tell([innerWidth, edges.length, Math.max(...edges.map((e) => e.right)), Math.min(...edges.map((e) => e.width)),
      box.scrollWidth - box.clientWidth, document.documentElement.scrollWidth]);
    """
    inner, pictures, right, narrowest, hidden, page = ask(run, script, width)
    assert inner == width and pictures == ROWS * len(MODELS)
    assert right < width and hidden <= 0 and page <= width
    assert narrowest >= 90


@pytest.mark.parametrize("width", [390, 1000, 1440])
def test_a_row_is_shown_large_by_its_address(run, width):
    script = """
    const images = [...document.querySelectorAll(".row:target img")].map((i) => i.getBoundingClientRect());
    tell([images.map((e) => [e.left, e.right, e.width, e.bottom])]);
    """
    [images] = ask(run, script, width, "#row-3")
    assert len(images) == len(MODELS)
    assert all(left >= 0 and right <= width and wide >= 160 for left, right, wide, _ in images)
    assert all(bottom <= 800 for *_, bottom in images)


def test_keys_lead_on_and_back_without_filling_the_history(run):
    script = """
    const press = (key) => dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
    const seen = [];
    const keys = ["ArrowRight", "open", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft", "Escape", "ArrowLeft"];
    const start = history.length;
    const next = () => {
      const key = keys.shift();
      if (!key) return tell([seen, history.length - start]);
      if (key === "open") document.querySelector("#row-1 img").click(); else press(key);
      setTimeout(() => { seen.push(document.querySelector(".row:target")?.id ?? ""); next(); }, 20);
    };
    next();
    """
    seen, pages = ask(run, script, 1000)
    last = f"row-{ROWS}"
    assert seen == ["", "row-1", "row-2", "row-1", last, f"row-{ROWS - 1}", "", ""]
    assert pages == 1


def test_a_click_beside_the_pictures_closes_the_row(run):
    script = """
    document.querySelector("#row-2").click();
    setTimeout(() => tell([location.hash, document.querySelectorAll(".row:target").length]), 20);
    """
    assert ask(run, script, 1000, "#row-2") == ["#at-2", 0]
