"""The README shows the code as it is."""

import json
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


def test_the_worlds_scores_are_the_records():
    record = json.loads((ROOT / "opd_ray/world/record.json").read_text())
    shown = (ROOT / "docs/world.md").read_text()
    for name, row in record["scores"]["models"].items():
        cells = [row[task][task] for task in ("compose", "text", "look")]
        cells += [row["mixed"][task] for task in ("compose", "text", "look")]
        assert f"| {name} | {row['guidance']:g} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in shown
    for guidance, row in record["guidance_sweep"]["base"].items():
        assert f"| {guidance} | {row['compose']:.3f} | {row['text']:.3f} | {row['look']:.3f} |" in shown
