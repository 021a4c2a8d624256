"""What a command costs before it works: help and configurations without torch, refusals without Ray."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
from opd_ray.cli import main

recipe, out = sys.argv[1:]

def run(*args):
    sys.argv = ["opd-ray", *args]
    try:
        main()
    except SystemExit as end:
        return end.code, sorted({"torch", "diffusers", "transformers", "ray", "pyarrow"} & sys.modules.keys())

told = [run("--help"), run("train", "--help"), run("config", "demo"), run("train", recipe, "--out", out)]
print(json.dumps(told))
"""


def test_nothing_is_imported_before_it_is_needed(recipe, tmp_path):
    bad = recipe(cluster={"runtime": "ray"}, student={"lora": {"targets": ["nope"]}})  # what is checked last
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(bad), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *light, (code, modules) = json.loads(done.stdout.splitlines()[-1])
    assert light == [[0, []]] * 3
    assert code == 2 and "torch" in modules and "ray" not in modules
    assert "error: LoRA 'student': targets nope match no linear layer" in done.stderr.splitlines()[-1]
