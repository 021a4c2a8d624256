"""MkDocs hooks: pages link to files of the repository, and to names in them, by what they are called.

``[`flow`](../opd_ray/diffusion/kernels.py#flow)`` leads to the file where the page is read in the repository; in the
site it leads to that function's line in a copy that the site holds, and says which line that is. So no line number
is written down, and a name that is gone fails the build. README's guide and the changelog become pages as they are.
"""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>[^)#\s:]*)(?:#(?P<name>[^)\s]+))?\)")
PICTURES = (".png", ".svg")
PAGES = {"README.md": "extending.md", "CHANGELOG.md": "changelog.md"}
STYLE = "body{margin:1rem;font:14px/1.5 system-ui}pre{line-height:1.4}:target{background:#fd6}td.linenos{color:#777}"


def on_files(files: Files, config: Any) -> None:
    """Add what the pages link to, and the pages that lie elsewhere."""
    for name, text in {"extending.md": _guide(), "changelog.md": _read("CHANGELOG.md")}.items():
        files.append(File.generated(config, name, content=_from_root(text)))
    sources = {
        file
        for page in files.documentation_pages()
        for link in LINK.finditer(page.content_string)
        if (file := _source(link["path"])) is not None and file.name not in PAGES
    }
    for source in sorted(sources):
        for file in [source, *(source.rglob("*.yaml") if source.is_dir() else ())]:
            name = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, _copy(name), content=_shown(name)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links out of docs/ to the copies in the site."""

    def lead(link: re.Match[str]) -> str:
        if (file := _source(link["path"])) is None:
            return link[0]
        name = file.relative_to(ROOT).as_posix()
        if name in PAGES:
            return f"[{link['text']}]({PAGES[name]}{'#' + link['name'] if link['name'] else ''})"
        if not link["name"]:
            return f"[{link['text']}]({_copy(name)})"
        number = line_of(name, link["name"])
        shown = name.replace("_", r"\_")  # of __init__.py
        return f"[{link['text']}]({_copy(name)}#L-{number}) {shown}:{number}"

    return LINK.sub(lead, markdown)


def line_of(file: str, name: str) -> int:
    """The line in which ``name`` (or ``Class.name``) is defined.

    Raises:
        PluginError: there is no such name.
    """
    body: list[ast.stmt] = ast.parse(_read(file)).body
    found: ast.stmt | None = None
    for part in name.split("."):
        found = next((node for node in body if part in _defined(node)), None)
        if found is None:
            raise PluginError(f"{file} defines no {name}")
        body = getattr(found, "body", [])
    assert found is not None
    return found.lineno


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def _source(path: str) -> Path | None:
    """The file or folder outside docs/ that a page's link leads to; None where it is none."""
    if not path.startswith("../") or path.endswith(PICTURES):
        return None
    file = (ROOT / "docs" / path).resolve()
    if not file.exists() or not file.is_relative_to(ROOT):
        raise PluginError(f"{path} is not in the repository")
    return file


def _copy(name: str) -> str:
    return f"source/{name}.html"


def _shown(name: str) -> str:
    """A file with numbered lines, or the list of a folder's files."""
    if (ROOT / name).is_dir():
        inside = sorted(file.relative_to(ROOT / name).as_posix() for file in (ROOT / name).rglob("*.yaml"))
        rows = "".join(f'<li><a href="{PurePosixPath(name).name}/{one}.html">{one}</a></li>' for one in inside)
        return f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>{rows}"
    try:
        lexer = get_lexer_for_filename(name)
    except ClassNotFound:
        lexer = TextLexer()
    form = HtmlFormatter(full=True, linenos="inline", linespans="L", title=html.escape(name))
    return str(highlight(_read(name), lexer, form)).replace("</style>", f"{STYLE}</style>", 1)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _guide() -> str:
    """README's part about what users add, one level of headings up."""
    body = re.findall(r"\n## Extending\n.*?(?=\n## )", _read("README.md"), re.DOTALL)[0]
    return re.sub(r"^#(#+ )", r"\1", body.strip(), flags=re.MULTILINE)


def _from_root(text: str) -> str:
    """Links as they are from docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\]\((?=opd_ray|configs|examples|benchmarks|tests|deploy|constraints)", "](../", text)
