"""The example in one file is the oracle: its losses and gradients are those of a run in this process."""

import ast
import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from opd_ray import recipes, world
from opd_ray.build import build
from opd_ray.experience import cut
from opd_ray.loop import train
from opd_ray.models.lora import read_lora
from opd_ray.report.live import Live
from opd_ray.seeds import fold, noise
from tests.algorithms.parts import flat, gradients, run_config, tiny, write_loras

__all__ = ["tiny"]

FILE = Path(__file__).parent.parent / "examples" / "one_file.py"
GUIDANCE = {"compose": 1.0, "text": 1.5, "look": 2.5}
ROUNDS = 2


@pytest.fixture(scope="module")
def one_file():
    spec = importlib.util.spec_from_file_location("one_file", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["one_file"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["one_file"]


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Teachers' LoRAs and prompt files, by task."""
    folder = tmp_path_factory.mktemp("files")
    for task in GUIDANCE:
        (folder / f"{task}.txt").write_text(f"{task} of a cat\n{task} of a dog\n{task} of a bird\n")
    return write_loras(tiny, folder, list(GUIDANCE)), {task: str(folder / f"{task}.txt") for task in GUIDANCE}


@pytest.fixture(scope="module")
def watched(tiny, files, tmp_path_factory):
    """A local run: its first weights, its items, and each round's task losses and gradients."""
    loras, prompts = files
    config = run_config(
        tiny,
        rounds=ROUNDS,
        sampling={"steps": 4},
        batch={"images_per_task": 4, "item_size": 2},
        teachers={name: {"lora": loras[name], "guidance": scale} for name, scale in GUIDANCE.items()},
        prompts={"train": prompts},
        ema=None,
    )
    seen = []
    live = Live(ROUNDS, "x", console=Console(file=io.StringIO()))
    with live, build(config, tmp_path_factory.mktemp("runs") / "run", live) as run:
        learner, update = run.learner.ranks[0]._host.learner, run.learner.update
        first = {name: p.detach().clone() for name, p in learner.student.items()}

        def watching(number):
            reports = update(number)
            losses = {task: total / count for task, (total, count) in reports[0].tasks.items()}
            seen.append((losses, flat(gradients(learner))))
            return reports

        run.learner.update = watching
        train(run)
        items = [cut(config, run.algorithm, run.source.stream, number) for number in range(ROUNDS)]
    return config, first, items, seen


def test_its_losses_and_gradients_are_those_of_a_run(one_file, tiny, files, watched):
    config, first, items, seen = watched
    pipe = one_file.load(str(tiny), files[0], rank=4, alpha=8)
    parameters = one_file.student_parameters(pipe)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(first[name.replace(".student.", ".")])
    pipe.scheduler.set_timesteps(4)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=1e-4)
    for number, (losses, gradient) in enumerate(seen):
        batches = {}
        for task in GUIDANCE:
            rows = [
                row for one in items[number] if one.task == task for row in zip(one.prompts, one.samples, strict=True)
            ]
            seeds = [fold(config.seed, "init_noise", number, prompt.id, sample) for prompt, sample in rows]
            texts = [prompt.text for prompt, _ in rows]
            batches[task] = one_file.Batch(texts, noise(seeds, (16, 8, 8)), (0, 1, 2))
        ours = one_file.train_round(pipe, optimizer, batches, GUIDANCE, 1.5, pipe.scheduler.sigmas)
        assert ours == pytest.approx(losses, rel=1e-5), number
        theirs = flat({name.replace(".student.", "."): parameter.grad for name, parameter in parameters.items()})
        assert float((theirs - gradient).norm() / gradient.norm()) < 1e-5, number
        assert gradient.norm() > 0


def test_it_runs_and_writes_a_lora_at_its_full_strength(one_file, tiny, files, tmp_path, capsys):
    loras, prompts = files
    tasks = [part for task in ("text", "look") for part in ("--task", task, loras[task], prompts[task], "1.5")]
    small = ["--images", "2", "--steps", "3", "--rank", "4", "--alpha", "8", "--rounds", "4", "--lr", "0.01"]
    one_file.main([*tasks, *small, "--model", str(tiny), "--out", str(tmp_path / "student")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("round   0  text 0.") and "  look 0." in lines[0] and lines[0].endswith(" images/s")
    written = read_lora("student", str(tmp_path / "student"))
    assert (written.config["r"], written.config["lora_alpha"]) == (4, 8)


def test_checkpoints_in_half_precision_compute_in_float32(one_file, tiny, tmp_path):
    one_file.StableDiffusion3Pipeline.from_pretrained(str(tiny)).to(torch.float16).save_pretrained(tmp_path)
    pipe = one_file.load(str(tmp_path), {}, rank=4, alpha=8)
    parts = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}


def test_it_stands_alone_and_is_short():
    tree = ast.parse(FILE.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] in {"opd_ray", "ray"}]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert all(node.returns for node in functions)
    assert len(FILE.read_text().splitlines()) < 200


def test_its_defaults_are_the_packaged_world_and_the_demo(one_file):
    assert f"{one_file.WORLD}/pipeline" == str(world.pipeline_path())
    demo = recipes.load("demo")
    assert dict(one_file.TASKS) == {name: teacher.guidance for name, teacher in demo.teachers.items()}
    for task, _ in one_file.TASKS:
        assert f"{one_file.WORLD}/lora/{task}" == str(world.lora_path(task))
        assert f"{one_file.WORLD}/prompts/{task}_train.jsonl" == str(world.prompts_path(task, "train"))
