"""DiffusionNFT, Flow-GRPO and GRPO-Guard as whole runs on the tiny model, and drawings of older policies."""

import pytest
import torch

from opd_ray.algorithms.flow_grpo import FlowGrpo
from opd_ray.algorithms.nft import DiffusionNft
from opd_ray.errors import ConfigError
from opd_ray.evaluation import Evaluation
from opd_ray.experience import RolloutSource
from opd_ray.storage import checkpoint
from tests.runtime.runs import Killer, go, metric, same

GRPO = ("flow_grpo", "grpo_guard")
NAMES = ("diffusion_nft", *GRPO)
GROUPS = {"images_per_task": 4, "item_size": 2, "images_per_prompt": 2}
SCORING = "tests.commands.scoring"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_from_its_first_update_on_and_goes_on_bit_for_bit(config, reports, tmp_path, name):
    whole = go(config(name, batch=GROUPS), tmp_path / "whole")
    first, second = reports
    assert all(report.grad_norm > 0 for report in first + second)
    if name == "diffusion_nft":
        assert len(first) == len(second) == 1
        assert metric(first[0], "error_good") == metric(first[0], "error_bad"), "the student is `old`"
        assert metric(second[0], "error_good") != metric(second[0], "error_bad")
    else:
        for updates in (first, second):
            assert len(updates) == 2, "two parts of the items"
            assert max(metric(updates[0], "ratio")) == 0, "the learner finds exactly what was drawn with"
            assert max(metric(updates[1], "ratio")) > 0
    assert max(metric(first[0], "ties")) == 0
    go(config(name, batch=GROUPS, rounds=1), tmp_path / "parts")
    assert same(go(config(name, batch=GROUPS), tmp_path / "parts", resume=True), whole)


@pytest.fixture
def drawn_with(monkeypatch):
    """Hashes of the weights of each round's drawings."""
    found, collect = [], RolloutSource.collect

    def collecting(source, round, weights):
        found.append(weights.sha256)
        return collect(source, round, weights)

    monkeypatch.setattr(RolloutSource, "collect", collecting)
    return found


@pytest.mark.parametrize("ema", [None, {"decay": 0.5, "every": 1}])
def test_old_draws_and_the_student_is_judged(config, prompts, tmp_path, monkeypatch, drawn_with, ema):
    judged, final = [], Evaluation.final
    monkeypatch.setattr(
        Evaluation, "final", lambda self, weights: judged.append(weights.sha256) or final(self, weights)
    )
    monkeypatch.setattr(DiffusionNft, "follow", lambda self, adapter, round: 1.0)  # `old` stays where it is
    reward = f"{SCORING}:brightness"
    settings = {
        "prompts": {"train": str(prompts), "eval": str(prompts)},
        "evaluation": {"images_per_task": 2, "steps": 2, "batch": 2, "rewards": {"a": [reward], "b": [reward]}},
        "ema": ema,
    }
    done = go(config("diffusion_nft", batch=GROUPS, **settings), tmp_path / "run")
    assert len(set(drawn_with)) == 1 and drawn_with[0] != done.result["student_sha256"]
    assert judged == [done.result["ema_sha256"] if ema else done.result["student_sha256"]]


def test_old_follows_the_student_at_its_schedule(config, tmp_path):
    """old <- 0.001 old + 0.999 student after the first round, and `old` was what the student began as."""
    (tmp_path / "runs").mkdir()
    go(config("diffusion_nft", batch=GROUPS, rounds=1), tmp_path / "runs" / "linear")
    go(config("diffusion_nft", batch=GROUPS, rounds=1, algorithm={"decay": "copy"}), tmp_path / "runs" / "copy")
    linear, copy = (checkpoint.newest(tmp_path / "runs" / name)[0].tensors for name in ("linear", "copy"))
    moved = 0.0
    for name, student in linear["student"].items():
        assert torch.equal(student, copy["student"][name]), "one update, by the same drawings"
        assert torch.equal(copy["adapter.old"][name], student)
        if name.endswith("lora_B.weight"):  # began at 0
            assert torch.allclose(linear["adapter.old"][name], 0.999 * student, rtol=1e-5, atol=0)
            moved += float(student.abs().sum())
    assert moved > 0


@pytest.mark.parametrize(("name", "policies"), [("diffusion_nft", 3), ("flow_grpo", 2), ("grpo_guard", 2)])
def test_no_forward_is_wasted(config, tmp_path, name, policies):
    """Eight images, three of four steps: the student, the frozen start, and `old`; a guided image is two rows."""
    done = go(config(name, rounds=1, batch=GROUPS), tmp_path / "run")
    assert done.rows[0]["forwards"] == {"rollout": 8 * 4 * 2, "reward": 0, "learner": 8 * 3 * policies * 2}
    done = go(config(name, rounds=1, batch=GROUPS, algorithm={"kl": 0.0}), tmp_path / "free")
    assert done.rows[0]["forwards"]["learner"] == 8 * 3 * (policies - 1) * 2


@pytest.mark.parametrize("name", NAMES)
def test_rewards_that_are_all_equal_teach_nothing_and_are_told(config, reports, tmp_path, name):
    done = go(config(name, batch=GROUPS, rewards={f"{SCORING}:constant": {"probe": "finite"}}), tmp_path / "run")
    assert max(report.grad_norm for updates in reports for report in updates) == (
        0 if name in GRPO else pytest.approx(0, abs=1e-6)
    )
    assert all(share == 1 for row in done.rows for steps in row["ties"].values() for share in steps.values())
    told = [note for note in done.notes if "equal rewards" in note]
    assert told == [
        "round 1: the images of every prompt have equal rewards (ties 1 in metrics.jsonl): nothing to learn"
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("never", r"scoring:never: it answers NaN, which means that it does not apply, for each of 1. prompts"),
        (
            "total",
            r"scoring:total answered shape \[\] on its probe picture; expected a number for each picture",
        ),
        ("broken", r"scoring:broken: its probe raised ConnectionError: the judge is away"),
    ],
)
def test_a_reward_that_fails_is_no_score(config, tmp_path, name, reward, message):
    with pytest.raises(Exception, match=message):
        go(config(name, batch=GROUPS, rewards={f"{SCORING}:{reward}": {"probe": "finite"}}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_one_is_refused(config, tmp_path, name):
    with pytest.raises(
        ConfigError, match=r"batch.images_per_prompt is 1, so that every advantage would be 0; set it to"
    ):
        go(config(name, batch={"images_per_task": 4, "item_size": 2}), tmp_path / "run")


@pytest.mark.parametrize("name", GRPO)
def test_without_noise_there_is_no_density(config, tmp_path, name):
    with pytest.raises(
        ValueError, match=r"noise_level 0 leaves steps without a density.*or use diffusion_nft \(rewards\)"
    ):
        config(name, batch=GROUPS, algorithm={"noise_level": 0.0})
    assert config("diffusion_nft", batch=GROUPS).algorithm.noise_level == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch": GROUPS | {"item_size": 4}},
            r"item_parts 2: each part needs a work item of each task.* a task has 1 ",
        ),
        ({"algorithm": {"reward_weights": {f"{SCORING}:brightness": 0}}}, "reward_weights are all 0"),
        ({"algorithm": {"clip_range": 0.0}}, "greater than 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config("flow_grpo", **({"batch": GROUPS} | changes))


LATE = {"max_staleness": 1}


def test_the_policy_that_drew_is_not_kept_for_noised_images(config, tmp_path):
    with pytest.raises(ConfigError, match=r"cluster.max_staleness \(now 1\) to 0, or use flow_grpo"):
        go(config("diffusion_nft", batch=GROUPS, cluster=LATE), tmp_path / "run")


@pytest.mark.parametrize("name", ["flow_grpo", "grpo_guard", "ddpo", "sdpo_stepwise", "pso_pairwise"])
def test_drawings_of_an_older_policy_are_compared_with_that_one(config, reports, tmp_path, monkeypatch, name):
    """The second round was drawn before the first update, by the untrained student: exactly what the adapter off is."""
    found = list[float]()

    def seeing(self, forward, velocity, original=FlowGrpo.loss):
        found.append(float(self.log_ratio(forward, velocity["reference"], forward.inputs["drawn"]).abs().max()))
        return original(self, forward, velocity)

    monkeypatch.setattr(FlowGrpo, "loss", seeing)
    done = go(config(name, batch=GROUPS, cluster=LATE), tmp_path / "run")
    assert [row["staleness"] for row in done.rows] == [0, 1]
    for updates in reports:
        assert all(report.grad_norm > 0 for report in updates)
    assert max(metric(reports[0][0], "ratio")) == 0 < max(metric(reports[1][0], "ratio"))
    assert max(found, default=0) == 0 and bool(found) == (name in GRPO)
    if name == "flow_grpo":
        assert same(go(config(name, batch=GROUPS, cluster=LATE), tmp_path / "again"), done)


SMALL = {"resources": {"cpu": 0.25}}


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.verify)])
def test_old_travels_also_where_one_of_two_workers_dies(config, ray_session, tmp_path, workers):
    killers = []
    many = SMALL | {"workers": workers}
    done = go(
        config("diffusion_nft", "ray", batch=GROUPS, cluster={"rollout": many, "rewards": {"default": many}}),
        tmp_path / "ray",
        watch=lambda run, live: killers.append(Killer(run, {"rollout": 1} if workers > 1 else {})),
    )
    assert len(killers[0].killed) == workers - 1
    assert same(done, go(config("diffusion_nft", batch=GROUPS), tmp_path / "local"))


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_agree_with_one(config, ray_session, tmp_path, name):
    batch = GROUPS | {"images_per_task": 8}  # each part of each task has an item for each rank
    alone = go(config(name, batch=batch), tmp_path / "local")
    both = go(config(name, "ray", batch=batch, cluster={"learner": SMALL | {"ranks": 2}}), tmp_path / "ray")
    for row, other in zip(both.rows, alone.rows, strict=True):
        assert row["loss"]["total"] == pytest.approx(other["loss"]["total"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
