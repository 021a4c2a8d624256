"""Distribution matching as whole runs on the tiny model, and its recipes beside the demo's."""

import pytest
import torch
from safetensors.torch import load_file

from opd_ray.errors import ConfigError
from opd_ray.models.lora import WEIGHTS
from opd_ray.recipes import load
from opd_ray.storage import checkpoint
from tests.runtime.runs import go, metric, same

NAMES = ("dmd", "tdm")


@pytest.fixture
def matching(make_config):
    """A run of two rounds by one of the two."""

    def made(name, runtime="local", rounds=2, **changes):
        algorithm = {"name": name, **changes.pop("algorithm", {})}
        return make_config(runtime, rounds=rounds, algorithm=algorithm, **changes)

    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_bit_for_bit_with_its_fake(matching, reports, tmp_path, name):
    whole = go(matching(name), tmp_path / "whole")
    for (report,) in reports:
        assert report.grad_norm > 0 and min(metric(report, "mismatch")) > 0 and min(metric(report, "fake_error")) > 0
    go(matching(name, rounds=1), tmp_path / "parts")
    assert same(go(matching(name), tmp_path / "parts", resume=True), whole)
    one, other = (checkpoint.newest(tmp_path / run)[0] for run in ("whole", "parts"))
    assert one.tensors.keys() == {"student", "adapter.fake", "ema", "optimizer"}
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        assert all(torch.equal(tensor, other.tensors[group][key]) for key, tensor in tensors.items()), group
    student, fake = one.tensors["student"], one.tensors["adapter.fake"]
    assert student.keys() == fake.keys() and any(not torch.equal(student[key], fake[key]) for key in fake)


def test_what_is_exported_is_the_student_alone(matching, tmp_path):
    go(matching("dmd", rounds=1), tmp_path / "run")
    saved = checkpoint.newest(tmp_path / "run")[0].tensors["student"]
    lora = load_file(tmp_path / "run" / "lora" / WEIGHTS)
    assert len(lora) == len(saved) and all(
        torch.equal(lora[f"transformer.{key}"], tensor) for key, tensor in saved.items()
    )


@pytest.mark.parametrize(("name", "fake_updates"), [("dmd", 1), ("tdm", 3)])
def test_no_forward_is_wasted(matching, reports, tmp_path, name, fake_updates):
    """Eight images, the first three of four steps. Student and teacher b are guided, so that their rows are two.

    `fake` has a row at each of the student's states and one at each of its own, of which every update has some.
    """
    done = go(matching(name, rounds=1, algorithm={"fake_updates": fake_updates}), tmp_path / "run")
    student, fake = 8 * 3 * 2, 8 * 3 * (1 + fake_updates)
    assert done.rows[0]["forwards"] == {"rollout": 8 * 3 * 2, "teacher": 4 * 3 + 4 * 3 * 2, "learner": student + fake}
    (updates,) = reports
    assert len(updates) == fake_updates


def test_teachers_are_asked_about_sampled_steps_alone(matching, tmp_path):
    done = go(matching("dmd", rounds=1, algorithm={"steps_per_item": 1}), tmp_path / "run")
    assert done.rows[0]["forwards"]["teacher"] == 4 * 1 + 4 * 1 * 2


def test_the_two_differ_by_their_times_alone(matching, tmp_path):
    """Which is enough to give other students from the same drawings."""
    found = {name: go(matching(name, rounds=1), tmp_path / name) for name in NAMES}
    assert found["dmd"].result["student_sha256"] != found["tdm"].result["student_sha256"]
    assert found["dmd"].rows[0]["forwards"] == found["tdm"].rows[0]["forwards"]


def test_drawings_with_noise_are_learned_from_too(matching, reports, tmp_path):
    """DMD2's own sampler, which noises the clean prediction again."""
    go(matching("dmd", rounds=1, algorithm={"kernel": "cps", "noise_level": 1.0}), tmp_path / "run")
    assert reports[0][0].grad_norm > 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"teachers": {}}, "algorithm dmd learns from teachers; teachers is empty"),
        ({"cluster": {"max_staleness": 1}}, r"set cluster.max_staleness \(now 1\) to 0"),
        ({"student": {"lora": None}}, "algorithm dmd also needs fake; train a LoRA"),
        ({"cluster": {"learner": {"backend": "deepspeed"}}}, "algorithm dmd also trains fake, .* set cluster.learner"),
        ({"algorithm": {"timestep_fraction": 0.1}}, "algorithm.timestep_fraction 0.1 of 4 steps leaves no step"),
        ({"algorithm": {"kernel": "ddim", "noise_level": 2.0}}, "algorithm.noise_level with kernel ddim"),
    ],
)
def test_what_does_not_fit_is_refused(matching, tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        go(matching("dmd", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
@pytest.mark.verify
def test_workers_give_the_student_of_one_process(matching, ray_session, tmp_path):
    """Teachers noise what was drawn by themselves."""
    done = go(matching("tdm", "ray"), tmp_path / "ray")
    assert same(done, go(matching("tdm"), tmp_path / "local"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_the_demo_but_for_its_algorithm_and_optimizer(name):
    demo, found = (load(recipe).model_dump(mode="json") for recipe in ("demo", f"world_{name}"))
    assert {key for key in demo if demo[key] != found[key]} == {"name", "algorithm"} | (
        {"optimizer"} if demo["optimizer"] != found["optimizer"] else set()
    )
    assert found["algorithm"]["name"] == name
    assert found["algorithm"]["steps_per_item"] == demo["algorithm"]["steps_per_item"]
    changed = load(
        f"world_{name}",
        [
            "optimizer.lr=1e-3",
            "rounds=5",
            "seed=3",
            "teachers={compose: {lora: world/compose, guidance: 1.0}, text: {lora: b}, look: {lora: c}}",
            "cluster.runtime=local",
            "evaluation.images_per_task=0",
        ],
    )
    assert (changed.optimizer.lr, changed.rounds, changed.seed, changed.cluster.runtime) == (1e-3, 5, 3, "local")
    assert changed.teachers["compose"].guidance == 1.0 and changed.evaluation.images_per_task == 0


@pytest.mark.verify
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_brings_the_worlds_student_towards_two_of_its_teachers(name, tmp_path):
    """The third, `look`, pulls against both; that is what the comparison with the demo is about."""
    short = ["rounds=24", "optimizer.lr=1e-3", "evaluation.images_per_task=48", "cluster.runtime=local"]
    scores = go(load(f"world_{name}", short), tmp_path / "run").result["scores"]
    for task in ("compose", "text"):
        base, student = (scores[model][task]["value"] for model in ("base", "student"))
        assert student > base + 0.1, task
