"""Run folders as a run would leave them, with invented but plausible numbers."""

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

TEACHERS = {"compose": ["compose"], "text": ["text"], "look": ["look"]}
TASKS = ["compose", "text", "look", "mixed:compose"]
MODELS = ["base", *(f"teacher:{name}" for name in TEACHERS), "student"]
ATTACK = '<script>alert(1)</script> [bold]"two" red & blue[/bold]'
PROMPTS = {
    "compose": "two red circles",
    "text": 'a card that says "fog"',
    "look": "a calm, warm evening at the quiet harbour",
    "mixed:compose": 'a blue square and the word "sun"',
}
SCORES = {
    "base": (0.318, 0.094, 0.412, 0.164),
    "teacher:compose": (0.871, 0.086, 0.334, 0.402),
    "teacher:text": (0.262, 0.914, 0.371, 0.203),
    "teacher:look": (0.274, 0.071, 0.893, 0.121),
    "student": (0.838, 0.889, 0.849, 0.617),
}


def use(workers: float, seconds: float, busy: float, transfer: float, input: float, queued: float = 0.0) -> dict:
    """What workers did in a round: ``input`` of the rest waits for input, the others for output."""
    rest = workers * seconds - busy - transfer
    idle = {"input": input * rest, "output": (1 - input) * rest}
    return {"workers": workers, "busy": busy, "transfer": transfer, **idle, "queued": queued, "answers": 9}


def roles(index: int, seconds: float) -> dict:
    """The text teacher is waited for until a second worker comes; that one is lost for a few rounds."""
    few = index < 40 or 60 <= index < 64
    return {
        "rollout": use(2, seconds, 1.1, 0.12, 0.0),
        "teacher.compose": use(1, seconds, 0.5, 0.05, 0.4),
        "teacher.text": use(1 if few else 2, seconds, 0.9, 0.06, 0.5, queued=1.0 if few else 0.1),
        "teacher.look": use(1, seconds, 0.5, 0.05, 0.4),
        "reward": use(1, seconds, 0.1, 0.02, 0.9),
        "learner": use(1, seconds, 0.7 if few else 1.2, 0.25, 1.0),
    }


def metrics_row(index: int, tasks=("compose", "text", "look")) -> dict:
    """One row of metrics.jsonl; the loss falls by half every eight rounds."""
    rng = random.Random(index)
    fall = 0.5 ** (index / 8)
    loss = {
        task: (0.004 + 0.05 * (place + 1) * fall) * math.exp(rng.gauss(0, 0.15)) for place, task in enumerate(tasks)
    }
    seconds = 2.1 + 0.1 * rng.random() + (1.6 if index == 31 else 0)
    row = {
        "round": index,
        "time": 1_700_000_000.0 + 2.2 * index,
        "seconds": {"round": seconds, "wait": 1.2, "update": seconds - 1.2, "checkpoint": 0.04},
        "roles": roles(index, seconds),
        "store": {"used": 3.1e8, "spilled": 0},
        "busy": {"rollout": 1.1, "teacher": 1.9, "reward": 0.1, "learner": 0.7},
        "loss": {"total": sum(loss.values()) / len(loss), **loss},
        "gap": {task: {str(s): 2 * x * (1 + 0.25 * (s - 4) ** 2) / 3 for s in range(9)} for task, x in loss.items()},
        "grad_norm": 0.02 + 0.6 * fall * math.exp(rng.gauss(0, 0.2)),
        "lr": 3e-4,
        "staleness": 0,
        "weight_version": f"0.0.{index + 1}",
        "forwards": {"rollout": 720, "teacher": 648, "learner": 648},
    }
    if index % 10 == 9:
        row["evaluation"] = {task: SCORES["student"][place] - 0.6 * fall for place, task in enumerate(TASKS)}
    return row


def result() -> dict:
    """result.json of a run that was evaluated."""
    scores = {
        model: {
            task: {"value": x, "low": x - 0.031, "high": x + 0.029, "n": 64}
            for task, x in zip(TASKS, values, strict=True)
        }
        for model, values in SCORES.items()
    }
    return {
        "status": "done",
        "rounds": 80,
        "weight_version": "0.0.80",
        "student_sha256": "5f" * 32,
        "ema_sha256": "a7" * 32,
        "scores": scores,
        "evaluation": {
            "guidance": {"base": 1.0, **{f"teacher:{t}": 1.0 for t in TEACHERS}, "student": 1.0},
            "steps": 10,
            "seed": 7,
            "images_per_task": 64,
        },
        "gap_closed": {
            "compose": {"value": 0.940, "low": 0.872, "high": 1.012},
            "text": {"value": 0.9695, "low": 0.93, "high": 1.004},
            "look": {"value": 0.9085, "low": 0.85, "high": 0.966},
        },
        "seconds": {"rollout": 88.0, "teacher": 152.0, "reward": 8.0, "learner": 56.0},
        "forwards": {"rollout": 57_600, "teacher": 51_840, "learner": 51_840},
        "teachers": {name: {"tasks": tasks, "guidance": 1.0} for name, tasks in TEACHERS.items()},
    }


def config_yaml(rounds: int = 80) -> str:
    lines = ["name: demo", "seed: 0", f"rounds: {rounds}", "model: {family: sd3, path: world}"]
    lines += ["# </pre><script>alert(2)</script>", "teachers:"]
    return "\n".join([*lines, *(f"  {n}: {{lora: world/{n}, guidance: 1.0}}" for n in TEACHERS), ""])


def picture(path: Path, color: tuple[int, int, int], size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (size, size), (236, 232, 224))
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, size * 3 // 4, size * 3 // 4), color)
    image.save(path)


def write_samples(folder: Path, rows_per_task: int = 2, size: int = 32) -> None:
    rows = []
    for task in TASKS:
        for place in range(rows_per_task):
            name = f"{task.replace(':', '-')}-{place:03d}.png"
            images = {model: f"{model.replace(':', '-')}/{name}" for model in MODELS}
            for shade, image in enumerate(images.values()):
                picture(folder / image, (60 * shade % 256, 90, 40 * place % 256), size)
            prompt = ATTACK if place == 1 else PROMPTS[task]
            rows.append({"task": task, "prompt": prompt, "seed": 100 + place, "images": images})
    (folder / "index.json").write_text(json.dumps({"models": MODELS, "rows": rows}))


def write_run(folder: Path, rounds: int = 80) -> Path:
    """A finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_yaml())
    facts = {"attempt": 0, "versions": {"torch": "2.15.0", "ray": "2.60.0"}, "note": ATTACK}
    (folder / "run.json").write_text(json.dumps(facts))
    rows = [json.dumps(metrics_row(index)) for index in range(rounds)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "result.json").write_text(json.dumps(result()))
    write_samples(folder / "samples")
    return folder
