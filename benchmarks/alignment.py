"""Three claims about alignment on the tiny world, under equal images and equal updates: docs/alignment_study.md.

    python benchmarks/alignment.py --out runs/alignment --seeds 0 1 2

Trains each arm with three seeds, in this process, and draws every model at the same held-out prompts and seeds. A run
that is in ``--out`` is not made again. What is compared, and how, was written down before the first run.
"""

import argparse
import io
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor

from opd_ray.actors import SampleRequest
from opd_ray.actors.rollout import draw_pictures
from opd_ray.commands.accuracy import Asked, ask
from opd_ray.commands.train import run_training
from opd_ray.comparison.judge import adapter_of
from opd_ray.config import Config, ModelConfig, PairsConfig
from opd_ray.evaluation.gauges import diversity, kernel_distance
from opd_ray.evaluation.models import find_model
from opd_ray.models import Family, load_family
from opd_ray.pairs.index import index_pairs
from opd_ray.prompts import read_prompts
from opd_ray.recipes import load
from opd_ray.storage.run_folder import read_json, write_json_atomic
from opd_ray.types import Prompt
from opd_ray.world import prompts_path, scorers
from opd_ray.world.samples import illustrations
from opd_ray.world.settings import Settings

TASKS = ("compose", "text")
PROMPTS, SAMPLES, VARIED = 256, 4, 48
"""Held-out prompts of each task that are scored; and, for diversity, pictures of each of the first few."""


@dataclass(frozen=True)
class Arm:
    """One method of a claim."""

    name: str
    recipe: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What is said to be better than what, at which numbers of steps."""

    name: str
    arms: tuple[Arm, ...]
    steps: tuple[int, ...]
    rates: tuple[str, ...] = field(default=("3e-4", "1e-3"))
    """Learning rates that each arm may choose from, by a seed and prompts that are not reported."""
    judged_at: int = 4
    """Steps at which that is decided."""


ONLINE = ("algorithm.pairs=online", "algorithm.times=model", "algorithm.kernel=ddim", "algorithm.noise_level=1.0")
RECORDED = ("algorithm.pairs=recorded", "prompts=null", "rewards={}", "batch.images_per_prompt=1")
LABELLED, FLIPPED, STEPS = 3000, 0.12, 10
"""Captions of the preference set, part of its labels that are turned, and steps that its pictures are drawn in."""
CLAIMS = (
    Claim("sdpo", (Arm("sdpo", "world_sdpo"), Arm("ddpo", "world_ddpo")), (1, 2, 4, 8)),
    Claim(
        "pso",
        (
            Arm("pso", "world_pso"),
            Arm("sft", "world_pso", ("algorithm={name: diffusion_dpo, loss: sft, space: eps}", *ONLINE)),
        ),
        (1, 2, 4),
    ),
    Claim(
        "dpo",
        (Arm("dpo", "world_dpo", RECORDED), Arm("sft", "world_dpo", (*RECORDED, "algorithm.loss=sft"))),
        (10, 50),
        judged_at=10,
    ),
)
TUNING_SEED = 100
HIDDEN = {"compose": scorers.compose_partial, "text": scorers.text}
"""What labels the preference set."""


def trained(claim: Claim, arm: Arm, rate: str, seed: int, out: Path, *, tuning: bool) -> Path:
    """The folder of a finished run."""
    seed = TUNING_SEED if tuning else seed
    name = f"{claim.name}-{arm.name}-{rate}-{seed}"
    folder = out / name
    if (folder / "result.json").exists() and read_json(folder / "result.json")["status"] == "done":
        return folder
    chosen = [*arm.changes, f"name={name}", f"seed={seed}", f"optimizer.lr={rate}", "cluster.runtime=local"]
    chosen += ["evaluation.images_per_task=0"]
    if RECORDED[0] in arm.changes:
        chosen.append(f"pairs={{files: [{labelled(out)}]}}")
    run_training(load(arm.recipe, chosen), folder, resume=(folder / "run.json").exists())
    return folder


def labelled(out: Path, split: str = "train") -> Path:
    """A preference set: two drawings of each caption, labelled by a scorer that no method sees, some labels turned."""
    path = out.resolve() / f"pairs-{split}.parquet"
    if path.exists():
        return path
    family = load_family(ModelConfig(family="sd", path="world/unet"), text=True, image=True)
    rng, rows = random.Random(0), list[dict[str, Any]]()
    for task in TASKS:
        prompts = prompts_of(split)[task][: LABELLED // len(TASKS)]
        both = [pictures(family, prompts, (number,) * len(prompts), STEPS) for number in (0, 1)]
        first, second = (HIDDEN[task](images, [prompt.text for prompt in prompts]).tolist() for images in both)
        for number, prompt in enumerate(prompts):
            if first[number] != second[number]:
                better = float((first[number] > second[number]) != (rng.random() < FLIPPED))
                files = {f"jpg_{side}": as_png(images[number]) for side, images in enumerate(both)}
                rows.append({**files, "label_0": better, "label_1": 1 - better, "caption": prompt.text})
    rng.shuffle(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=256)
    return path


def as_png(image: Tensor) -> bytes:
    """A picture [3, H, W] in [0, 1] as a file."""
    file = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "PNG")
    return file.getvalue()


def prompts_of(split: str) -> dict[str, Sequence[Prompt]]:
    """The shipped prompts of the two tasks."""
    return {task: read_prompts({task: str(prompts_path(task, split))}, split)[task] for task in TASKS}


def chosen_rate(claim: Claim, arm: Arm, family: Family, out: Path) -> str:
    """The rate whose student scores best at prompts and with a seed that are not reported."""
    prompts, found = {task: own[-128:] for task, own in prompts_of("train").items()}, {}
    for rate in claim.rates:
        worth = judge(family, trained(claim, arm, rate, 0, out, tuning=True) / "lora", prompts, claim.judged_at)
        found[rate] = statistics.mean(worth[task] for task in TASKS)
    return max(found, key=found.__getitem__)


def pictures(family: Family, prompts: Sequence[Prompt], samples: Sequence[int], steps: int) -> Tensor:
    """Drawn without guidance, by the ODE, at seeds that all models share."""
    drawn = []
    for start in range(0, len(prompts), 64):
        part = slice(start, start + 64)
        request = SampleRequest("student", None, 1.0, steps, 7, tuple(prompts[part]), tuple(samples[part]))
        drawn.append(draw_pictures(family, request))
    return torch.cat(drawn)


def true_pictures(prompts: Sequence[Prompt]) -> Tensor:
    """Renderings of just what the prompts ask for, in the styles that the U-Net was trained on."""
    return illustrations([prompt.text for prompt in prompts], Settings().unet_recipe.styles)


def judge(family: Family, lora: Path | None, prompts: dict[str, Sequence[Prompt]], steps: int) -> dict[str, float]:
    """Strict scores, and the gauges that nobody optimises."""
    found, distances, spreads = {}, [], []
    with adapter_of(family, lora):
        for task, own in prompts.items():
            images = pictures(family, own, (0,) * len(own), steps)
            found[task] = float(getattr(scorers, task)(images, [prompt.text for prompt in own]).nanmean())
            true = family.encode_images(true_pictures(own))
            distances.append(kernel_distance(family.encode_images(images), true).value)
            some = [prompt for prompt in own[:VARIED] for _ in range(SAMPLES)]
            varied = family.encode_images(pictures(family, some, tuple(range(SAMPLES)) * VARIED, steps))
            spreads.append(diversity(varied.split(SAMPLES)).value)
    return found | {"fidelity": statistics.mean(distances), "diversity": statistics.mean(spreads)}


def rows_of(claim: Claim, seeds: Sequence[int], out: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Arm -> steps -> what each seed's student is worth; the start stands for itself."""
    config: Config = load(claim.arms[0].recipe, ["cluster.runtime=local"])
    prompts = {task: own[:PROMPTS] for task, own in prompts_of("heldout").items()}
    family = load_family(config.model, text=True, image=True)
    path = out / f"{claim.name}.json"
    known: dict[str, Any] = read_json(path) if path.exists() else {}

    def note(arm: str, steps: int, seed: int, lora: Path | None) -> None:
        key = f"{arm}/{steps}/{seed}"
        if key not in known:
            known[key] = judge(family, lora, prompts, steps)
            write_json_atomic(path, known)

    for steps in claim.steps:
        note("start", steps, 0, None)
    for arm in claim.arms:
        rate = known.get(f"{arm.name}/rate") or chosen_rate(claim, arm, family, out)
        known[f"{arm.name}/rate"] = rate
        for seed in seeds:
            folder = trained(claim, arm, rate, seed, out, tuning=False)
            for steps in claim.steps:
                note(arm.name, steps, seed, folder / "lora")
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for key, value in known.items():
        arm_name, _, rest = key.partition("/")
        if rest != "rate":
            found.setdefault(arm_name, {}).setdefault(rest.partition("/")[0], []).append(value)
    return found


def table(claim: Claim, found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Means over seeds (lowest to highest)."""
    columns = (*TASKS, "fidelity", "diversity")
    print(f"\n### {claim.name}\n\n| model | steps | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for steps in map(str, claim.steps):
        for name in ("start", *(arm.name for arm in claim.arms)):
            cells = []
            for column in columns:
                values = [row[column] for row in found[name][steps]]
                spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            print(f"| {name} | {steps} | {' | '.join(cells)} |", flush=True)


def verdicts(claim: Claim, found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """The first arm less the second one, seed by seed: holds beyond two standard errors, fails below minus two."""
    first, second = (arm.name for arm in claim.arms)
    print()
    for steps in map(str, claim.steps):
        for what in ("score", "fidelity"):
            apart = [
                worth(a, what) - worth(b, what) for a, b in zip(found[first][steps], found[second][steps], strict=True)
            ]
            mean, error = statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 1.0
            good = mean if what == "score" else -mean  # a distance is better the smaller it is
            verdict = "holds" if good > 2 * error else "fails" if good < -2 * error else "undecided"
            print(f"{first} - {second}, {steps} steps, {what}: {mean:+.3f} +- {error:.3f}: {verdict}", flush=True)


def preferences(claim: Claim, seeds: Sequence[int], out: Path) -> None:
    """Implicit reward accuracy at held-out pairs whose labels are turned as often as those that were trained on."""
    known, chosen = read_json(out / f"{claim.name}.json"), PairsConfig(files=(str(labelled(out, "heldout")),))
    index = index_pairs(chosen)
    asked = Asked(min(512, index.pairs), 8, 0, 32)
    for arm in claim.arms:
        runs = [trained(claim, arm, known[f"{arm.name}/rate"], seed, out, tuning=False) for seed in seeds]
        found = [ask(find_model(str(run)), chosen, index, asked, lambda done: None)["value"] or 0.0 for run in runs]
        spread = f"{statistics.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"
        print(f"{arm.name}: implicit accuracy {spread}; at most {1 - FLIPPED:.2f} can be had", flush=True)


def worth(row: dict[str, float], what: str) -> float:
    """The mean of the strict scores, or a gauge."""
    return statistics.mean(row[task] for task in TASKS) if what == "score" else row[what]


def main() -> None:
    """Train what is missing, judge everything, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[claim.name for claim in CLAIMS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for claim in CLAIMS:
        if args.only is None or claim.name in args.only:
            found = rows_of(claim, args.seeds, args.out)
            table(claim, found)
            verdicts(claim, found)
            if RECORDED[0] in claim.arms[0].changes:
                preferences(claim, args.seeds, args.out)


if __name__ == "__main__":
    main()
