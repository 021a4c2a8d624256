"""What the pages say of the code is so: configuration keys, error texts, commands."""

import ast
import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from opd_ray import recipes
from opd_ray.algorithms import ALGORITHMS
from opd_ray.cli import app
from opd_ray.comparison.arms import Arm, Merging
from opd_ray.comparison.checks import check
from opd_ray.comparison.hypotheses import Hypothesis
from opd_ray.comparison.hypotheses import Test as OneTest
from opd_ray.comparison.nodes import Place
from opd_ray.comparison.protocol import Judged, Protocol, Quick, Tuning, read_protocol
from opd_ray.config import Config
from opd_ray.config.section import Frozen
from opd_ray.planning.rates import Rates
from tests.source import GAP, template

ROOT = Path(__file__).parent.parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
GROUP = typer.main.get_command(app)


def sections(kind: type[Frozen] = Frozen):
    """Every section of a configuration."""
    for section in kind.__subclasses__():
        yield section
        yield from sections(section)


@pytest.mark.parametrize("section", [*sections()], ids=lambda section: section.__name__)
def test_every_key_is_described(section) -> None:
    bare = [name for name, field in section.model_fields.items() if not (field.description or "").strip()]
    assert not bare, f"{section.__name__}: give {', '.join(bare)} a docstring"


def test_the_page_of_all_keys_is_the_schemas() -> None:
    spec = importlib.util.spec_from_file_location("config_page", ROOT / "scripts" / "config_page.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert PAGES["configuration.md"] == maker.page(), "run `make docs` (or python scripts/config_page.py)"
    for name, section in recipes.schema()["$defs"].items():
        for key in section.get("properties", ()):
            assert f"| `{key}` |" in maker.page(), (name, key)


def quoted() -> list[str]:
    """The texts that the troubleshooting page quotes."""
    tables = PAGES["troubleshooting.md"].partition("## What is seen, and says nothing")[0]
    rows = [row for row in re.findall(r"^\| (.+?) \|", tables, re.MULTILINE) if row not in {"it says", "---"}]
    assert all(re.fullmatch(r"`[^`]+`", row) for row in rows)
    return [row.strip("`") for row in rows]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "opd_ray").rglob("*.py"))]
    return [text for tree in trees for node in ast.walk(tree) if (text := template(node))]


@pytest.mark.parametrize("text", quoted())
def test_every_quoted_error_is_one_of_the_codes(text, texts) -> None:
    """Each gap of the page stands for one of the code's, and for anything that follows one."""
    pieces = [piece.strip() for piece in text.split(GAP) if piece.strip(" .;,:()")]
    pattern = re.compile(".*?".join(map(re.escape, pieces)))
    assert any(pattern.search(one) for one in texts), "no code says this"
    assert sum(len(piece) for piece in pieces) >= 12, "too little to be recognised by"


def blocks(text: str, kind: str = "") -> list[str]:
    """A page's blocks of code of one kind."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == kind]


def commands(text: str):
    """The words of every `opd-ray` command in a page's blocks of code, continued lines joined, comments left out."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^\s*(?:\S*/)?|-- )opd-ray (.*)", line)
            if found and " -> " not in line:  # what a command printed
                yield shlex.split(found[1], comments=True)


COMMANDS = [(page, words) for page, text in PAGES.items() for words in commands(text)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda one: one if isinstance(one, str) else " ".join(one))
def test_every_command_of_a_page_is_one(page, words) -> None:
    words = words[: words.index(">")] if ">" in words else words
    verb, *rest = words
    command = GROUP.commands[verb]
    with command.make_context(verb, list(rest)) as context:  # parses, and runs nothing
        given = context.params
    if given.get("config") in recipes.recipes():
        recipes.load(given["config"], given.get("override") or [])


def test_the_commands_are_found() -> None:
    assert {words[0] for _, words in COMMANDS} == set(GROUP.commands)
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_mentioned_exists(page) -> None:
    """Also outside of blocks: `opd-ray VERB --option`."""
    wrong = []
    for inline in re.findall(r"`opd-ray ([a-z][^`]*)`", PAGES[page]):
        verb, *words = inline.split()
        known = {name for option in GROUP.commands[verb].params for name in (*option.opts, *option.secondary_opts)}
        wrong += [inline for word in words if word.startswith("-") and word.split("=")[0] not in known]
        recipe = next((word for word in words if word in recipes.recipes()), "demo")
        given = [
            word for before, word in itertools.pairwise(words) if before in {"-o", "--override"} and "..." not in word
        ]
        recipes.load(recipe, given)  # whatever recipe it is for, its keys are those of all
    assert not wrong


def test_the_planner_says_what_the_guide_shows(tmp_path, monkeypatch, capsys) -> None:
    (rates,) = blocks(PAGES["scaling.md"], "yaml")
    (shown,) = (block for block in blocks(PAGES["scaling.md"]) if block.startswith("  role "))
    monkeypatch.chdir(tmp_path)
    Path("rates.yaml").write_text(rates)
    (words,) = (
        words for page, words in COMMANDS if page == "scaling.md" and "rates.yaml" in words and "--rates" in words
    )
    GROUP.main(words, prog_name="opd-ray", standalone_mode=False)
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown.splitlines() if line.strip() and line.strip() not in said] == []


def test_the_recipe_fragments_of_the_pages_name_keys_that_exist() -> None:
    known = {*Config.model_fields, *Rates.model_fields, *Protocol.model_fields}
    for name, text in PAGES.items():
        for block in blocks(text, "yaml"):
            data = yaml.safe_load(block)
            assert set(data) <= known, (name, block)
            for arm in data.get("arms", {}).values():
                Arm.model_validate(arm)


def test_the_whole_protocol_of_the_page_can_be_carried_out(tmp_path) -> None:
    """And the page has a word on every key."""
    page = PAGES["protocols.md"]
    (whole,) = (block for block in blocks(page, "yaml") if "hypotheses:" in block)
    path = tmp_path / "protocol.yaml"
    path.write_text(whole)
    protocol, _ = read_protocol(path)
    check(protocol, Place(tmp_path / "out"), path)
    for section in (Protocol, Tuning, Judged, Arm, Merging, Hypothesis, OneTest, Quick):
        unsaid = [key for key in section.model_fields if not re.search(rf"\b{key}\b", page)]
        assert not unsaid, section.__name__


def test_the_comparison_says_when_it_was_read_and_where() -> None:
    text = PAGES["comparison.md"]
    assert all(f"`{name}`" in text for name in ALGORITHMS), "what there is stands among what others have"
    assert re.search(r"\*\*As of [A-Z][a-z]+ \d{4}\*\*", text)
    claims = re.findall(r"https?://[^)\s]+", text)
    assert len(claims) > 15
    assert all(re.match(r"https://(github\.com/[\w.-]+/[\w.-]+|arxiv\.org/abs/\d)", one) for one in claims)
