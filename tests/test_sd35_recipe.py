"""The SD3.5 recipe itself, on a small random pipeline of the same architecture and files, against plain diffusers."""

import io
import shutil

import pytest
import torch
import yaml
from rich.console import Console

from opd_ray.build import build
from opd_ray.experience import cut
from opd_ray.preflight import overlaps
from opd_ray.prompts import read_prompts
from opd_ray.recipes import load
from opd_ray.report.live import Live
from opd_ray.seeds import fold, noise
from tests.algorithms.parts import flat, gradients
from tests.algorithms.parts import load as load_tiny
from tests.models.tiny_sd3 import make_tiny_sd3
from tests.test_one_file import one_file

__all__ = ["one_file"]

TEACHERS = {"geneval": "GenEvalTeacher/lora", "ocr": "OCRTeacher/lora", "pickscore": "AesTeacher/lora"}
GUIDANCE = {"geneval": 1.0, "ocr": 4.5, "pickscore": 4.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """512 pixels are 64 x 64 latents in it, as in the real one."""
    return make_tiny_sd3(tmp_path_factory.mktemp("recipe") / "sd3", width=16, blocks=4, largest=32)


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """Teachers in PEFT's layout in the published repository's folders, and beside them in diffusers'."""
    folder = tmp_path_factory.mktemp("published")
    family, recipe = load_tiny(model), load("sd35_mopd")
    for seed, (name, place) in enumerate(TEACHERS.items()):
        family.add_lora(name, recipe.student.lora, seed)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in family.adapter_parameters(name).values():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
        family.save_lora(name, folder / "diffusers" / name)
        shutil.copytree(folder / "diffusers" / name / "peft", folder / "peft" / place)
    return folder


def first_update(config, folder):
    """Task losses, gradient, first weights and items of the first round."""
    live = Live(1, "x", console=Console(file=io.StringIO()))
    with live, build(config, folder, live) as run:
        learner = run.learner.ranks[0]._host.learner
        first = {name: p.detach().clone() for name, p in learner.student.items()}
        batch = run.source.collect(0, run.learner.publish())
        run.learner.begin(batch.items)
        with run.arrivals(batch) as arrivals:
            for one in arrivals:
                run.learner.take(one)
        (report,) = run.learner.update(0)
        losses = {task: total / count for task, (total, count) in report.tasks.items()}
        return losses, flat(gradients(learner)), first, cut(config, run.algorithm, run.source.stream, 0)


def check(one_file, model, published, tmp_path, *overrides):
    """Only paths and the cluster file are replaced, and what ``overrides`` makes smaller."""
    (tmp_path / "here.yaml").write_text(yaml.safe_dump({"runtime": "local", "share_teachers": True}))
    files = {task: tmp_path / f"{task}.txt" for task in TEACHERS}
    for task, file in files.items():
        file.write_text("".join(f"{task} picture number {n}\n" for n in range(30)))
    paths = [f"model.path={model}", *(f"teachers.{task}.lora={published / 'peft'}" for task in TEACHERS)]
    paths += [f"prompts.{split}.{task}={file}" for split in ("train", "eval") for task, file in files.items()]
    config = load("sd35_mopd", [*paths, f"cluster={tmp_path / 'here.yaml'}", *overrides])
    losses, gradient, first, items = first_update(config, tmp_path / "run")

    pipe = one_file.load(str(model), {task: str(published / "diffusers" / task) for task in TEACHERS}, 32, 64)
    parameters = one_file.student_parameters(pipe)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(first[name.replace(".student.", ".")])
    steps, batches = config.sampling.steps, {}
    pipe.scheduler.set_timesteps(steps)
    for task in TEACHERS:
        rows = [row for one in items if one.task == task for row in zip(one.prompts, one.samples, strict=True)]
        start = noise([fold(42, "init_noise", 0, prompt.id, sample) for prompt, sample in rows], (16, 64, 64))
        batches[task] = one_file.Batch([prompt.text for prompt, _ in rows], start, range(steps - 1))
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-4, weight_decay=1e-4)
    expected = one_file.train_round(pipe, optimizer, batches, GUIDANCE, 4.5, pipe.scheduler.sigmas)
    assert losses == pytest.approx(expected, rel=1e-5)
    theirs = flat({name.replace(".student.", "."): p.grad for name, p in parameters.items()})
    assert float((theirs - gradient).norm() / gradient.norm()) < 1e-5
    assert gradient.norm() > 0


def test_its_first_update_is_that_of_plain_diffusers(one_file, model, published, tmp_path):
    smaller = ("batch.images_per_task=1", "batch.item_size=1", "sampling.steps=4")
    check(one_file, model, published, tmp_path, *smaller)


@pytest.mark.verify
def test_its_first_update_at_its_own_batch_is_that_of_plain_diffusers(one_file, model, published, tmp_path):
    check(one_file, model, published, tmp_path)


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b.txt").write_text("two\nfour\none\n")
    train, held_out = (read_prompts({"t": str(tmp_path / f"{name}.txt")}, "x") for name in "ab")
    (said,) = overlaps(train, held_out)
    assert said == "2 of 3 held-out prompts of t are also trained on: its scores are too good"
    assert not list(overlaps(train, {"t": ()}))
