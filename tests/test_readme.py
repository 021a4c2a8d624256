"""The README shows the code as it is."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_loop_in_the_readme_is_the_loop():
    source = (ROOT / "opd_ray" / "loop.py").read_text()
    shown = source[source.index("def train(") :].rstrip()
    assert f"```python\n{shown}\n```" in (ROOT / "README.md").read_text()


def test_every_link_of_the_documentation_leads_somewhere():

    broken = [
        f"{page.name}: {target}"
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken
