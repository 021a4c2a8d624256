"""The specialists, trained from the base by reward as any user would: by `opd-ray train` on the folder being built."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from opd_ray.errors import Stopped
from opd_ray.recipes import assignments
from opd_ray.world import prompt_file

WEIGHTS = "pytorch_lora_weights.safetensors"
LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
    "attn.add_v_proj", "attn.to_add_out", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
"""Every linear layer of the blocks."""
_LOOK_S = 0.5
_LAST_WORDS = 800


@dataclass(frozen=True)
class Specialist:
    """One teacher: the recipe that trains it, what is set in that, and the guidance it is to be queried at."""

    rounds: int
    reward: str
    """What it learns from; the strict score of the task is shown beside it."""
    recipe: str = "world_nft"
    learning_rate: float = 1e-3
    images: int = 96
    """Of a round."""
    guidance: float = 1.0
    """Of training and of queries: DiffusionNFT trains without, and what it learns stands in place of guidance."""


def overrides(out: Path, task: str, one: Specialist, rank: int, seed: int) -> list[str]:
    """What a specialist's recipe is told to change, as `opd-ray train` takes it; alpha is twice the rank."""
    names = sorted({task, one.reward})
    changed: dict[str, Any] = {
        "rounds": one.rounds,
        "seed": seed,
        "model.path": str(out.resolve() / "pipeline"),
        "student.guidance": one.guidance,
        "student.lora": {"rank": rank, "alpha": 2 * rank, "targets": LORA_TARGETS},
        "optimizer.lr": one.learning_rate,
        "batch.images_per_task": one.images,
        "prompts": {"train": {task: str(out.resolve() / prompt_file(task, "train"))}},
        "rewards": {name: {} for name in names},
        "algorithm.reward_weights": {name: 0 for name in names if name != one.reward},
        # Scores are the last stage's, of what was saved.
        "evaluation": {"images_per_task": 0},
        "cluster.runtime": "local",
    }
    return assignments(changed)


def train(recipe: str, run: Path, changed: list[str], tick: Callable[[int, dict[str, float]], None]) -> None:
    """Run a recipe to its end in a process of its own, on from the last checkpoint where ``run`` has one.

    Its output goes to ``run`` with `.log` behind its name. Where this process is interrupted, the other ends its round
    and writes a checkpoint first.

    Raises:
        Stopped: the training did not come to its end.
    """
    log = run.with_name(run.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["train", recipe, "--resume", "--out", str(run.parent), "-o", f"name={run.name}"]
    command = [sys.executable, "-m", "opd_ray", *words, *(word for one in changed for word in ("-o", one))]
    with log.open("w") as output:
        # In a session of its own: a Ctrl-C would reach it twice, and twice means at once, without a checkpoint.
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            told = 0
            while child.poll() is None:
                time.sleep(_LOOK_S)
                told += _tell(run / "metrics.jsonl", told, tick)
            _tell(run / "metrics.jsonl", told, tick)
        finally:
            child.terminate()
            child.wait()
    if child.returncode:
        end = " ".join(log.read_text()[-_LAST_WORDS:].split())
        raise Stopped(f"{' '.join(words[:2])} ended with exit code {child.returncode} (log: {log}): {end}")


def _tell(metrics: Path, told: int, tick: Callable[[int, dict[str, float]], None]) -> int:
    """Tell of the rounds that are done and were not told of, and how many they were."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    new = [json.loads(line) for line in lines[told:] if line.endswith("\n")]
    for row in new:
        tick(1, row["scores"])
    return len(new)


def save_half(source: Path, target: Path) -> None:
    """Copy a LoRA's weights in float16 with its header: without that alpha would load as the rank."""
    target.mkdir(parents=True, exist_ok=True)
    with safe_open(source / WEIGHTS, framework="pt") as file:
        tensors = {key: file.get_tensor(key).half() for key in file.keys()}  # noqa: SIM118
        save_file(tensors, target / WEIGHTS, metadata=file.metadata())
