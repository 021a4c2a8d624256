"""The site builds without a warning, stands alone, leads nowhere that is not there, and fits a phone."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent.parent
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WORDS = {"href": {"a", "link"}, "src": {"img", "script", "iframe"}}


class Links(HTMLParser):
    """The targets of a page's links, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in {"stylesheet", "shortcut icon"}:
            self.loads.append(given["href"])
        if tag in WORDS["src"] and given.get("src"):
            self.loads.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Links]:
    return {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def pages_of(folder: Path, kind: str) -> set[str]:
    """The pages of docs/, also those below it, by their paths without an ending."""
    below = [folder, *(folder / path.name for path in (ROOT / "docs").iterdir() if path.is_dir())]
    return {file.relative_to(folder).with_suffix("").as_posix() for part in below for file in part.glob(f"*.{kind}")}


def named(site: Path) -> set[str]:
    """The pages that a reader meets in the navigation."""
    return pages_of(site, "html") - {"404", "search"}


def test_every_page_of_the_folder_and_of_the_root_is_in_the_site(site) -> None:
    assert named(site) == pages_of(ROOT / "docs", "md") | {"extending", "changelog"}
    reached = set(Links((site / "404.html").read_text()).links)  # the navigation alone
    assert {link.strip("/").removesuffix(".html") for link in reached if link.endswith(".html")} == named(site)


def test_every_link_within_the_site_leads_to_a_page_and_an_anchor(site, pages) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            target, _, anchor = link.partition("#")
            if "://" in link or path.name == "404.html" or link in {"#", ""}:
                continue
            leads = (path.parent / unquote(target)).resolve() if target else path
            leads = leads / "index.html" if leads.is_dir() else leads
            if not leads.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif anchor and leads.suffix == ".html" and unquote(anchor) not in pages[leads].anchors:
                broken.append(f"{path.relative_to(site)}: no anchor {link}")
    assert not broken


def test_nothing_is_fetched_from_elsewhere(pages) -> None:
    assert not [(path.name, load) for path, page in pages.items() for load in page.loads if "//" in load]


def test_a_symbol_of_the_paper_leads_to_the_line_that_defines_it(site) -> None:
    text = (site / "paper.html").read_text() + (site / "api.html").read_text()
    found = re.findall(r'href="(source/[^"#]+)#L-(\d+)">.*?</a> ([\w./]+):(\d+)', text)
    assert len(found) > 50 and found[-1][2] == "opd_ray/__init__.py"
    for copy, line, file, number in found:
        assert (copy, line) == (f"source/{file}.html", number)
    assert ("source/opd_ray/diffusion/kernels.py.html", str(line_of("def flow("))) in {one[:2] for one in found}


def line_of(start: str) -> int:
    lines = (ROOT / "opd_ray/diffusion/kernels.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.startswith(start))


def test_a_name_that_is_gone_fails_the_build(tmp_path) -> None:
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "protocol.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "scripts", "configs", "deploy", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "opd_ray", tmp_path / "opd_ray", ignore=shutil.ignore_patterns("shipped", "__pycache__"))
    page = tmp_path / "docs" / "paper.md"
    page.write_text(page.read_text().replace("kernels.py#flow)", "kernels.py#flaw)", 1))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )
    assert done.returncode != 0 and "opd_ray/diffusion/kernels.py defines no flaw" in done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways(site, tmp_path, width) -> None:
    """In frames, since a window is never narrower than 500 pixels; only tables and code scroll, in themselves."""
    names, folder = sorted(named(site)), tmp_path / "site"
    shutil.copytree(site, folder)
    tell = '<script>parent.postMessage([NAME, document.documentElement.scrollWidth], "*")</script>'
    for name in names:
        text = (
            (site / f"{name}.html").read_text().replace("</body>", tell.replace("NAME", json.dumps(name)) + "</body>")
        )
        (folder / f"{name}-probed.html").write_text(text)
    frames = "".join(f'<iframe src="{name}-probed.html" width="{width}" height="800"></iframe>' for name in names)
    collect = 'addEventListener("message", (e) => document.body.append("<" + JSON.stringify(e.data) + ">"))'
    (folder / "frames.html").write_text(f"<script>{collect}</script><body>{frames}")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'browser'}",
        "--window-size=1600,900",
    ]
    page = (folder / "frames.html").as_uri()
    done = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=8000", "--dump-dom", page], capture_output=True, text=True, timeout=90
    )
    widths = dict(json.loads(one) for one in re.findall("&lt;(.*?)&gt;", done.stdout))
    assert sorted(widths) == names
    assert {name: seen for name, seen in widths.items() if seen > width} == {}
