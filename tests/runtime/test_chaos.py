"""The chaos benchmark itself, short: its own Ray, its own counts, the same student."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.runs import bare_environment

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.timeout(900)
def test_four_kills_change_no_bit_and_the_work_is_soon_being_done_again(tmp_path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, SCRIPT, "--kills", "4", "--rounds", "6", "--seed", "1", "--out", out]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=800, env=bare_environment())
    assert ended.returncode == 0, ended.stderr
    table = out.read_text()
    assert "4 kills in 6 rounds, seed 1: the student is identical, bit for bit" in table
    rows = [
        line.strip("| ").split(" | ") for line in table.splitlines() if re.match(r"\| (rollout|teacher|learner)", line)
    ]
    assert sum(int(row[2]) for row in rows) == 4
    assert all(row[-1].split(" of ")[0] == row[-1].split(" of ")[1] for row in rows), table
