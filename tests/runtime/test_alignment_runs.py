"""DDPO, SDPO and PSO as whole runs on the tiny model."""

import math

import pytest
import torch

from opd_ray.algorithms import make_algorithm
from opd_ray.algorithms.ddpo import Ddpo
from opd_ray.algorithms.sdpo import Sdpo
from opd_ray.algorithms.stepwise import Stepwise
from opd_ray.config import DdpoConfig, SdpoConfig
from opd_ray.errors import ConfigError, DriftError
from opd_ray.storage import checkpoint
from opd_ray.types import Prompt, WorkItem
from tests.runtime.runs import Killer, go, metric, same

ALIGNMENT = ("ddpo", "sdpo_stepwise", "pso_pairwise")
GROUPS = {"images_per_task": 4, "item_size": 2, "images_per_prompt": 2}


@pytest.mark.parametrize("name", ALIGNMENT)
def test_a_run_learns_from_its_first_update_on_and_goes_on_bit_for_bit(config, reports, tmp_path, name):
    whole = go(config(name), tmp_path / "whole")
    for updates in reports[:2]:
        assert len(updates) == (1 if name == "pso_pairwise" else 3)  # of four steps three are trained on
        assert all(report.grad_norm > 0 for report in updates)
    if name == "pso_pairwise":
        assert max(metric(reports[0][0], "ratio")) == 0, "the student is the reference"
        assert reports[0][0].loss == pytest.approx(math.log(2), abs=1e-6) and max(metric(reports[0][0], "ties")) == 0
    else:
        for updates in reports[:2]:
            assert max(metric(updates[0], "ratio")) == 0, "the learner finds exactly what was drawn with"
            assert max(metric(updates[-1], "ratio")) > 0
    go(config(name, rounds=1), tmp_path / "parts")
    assert same(go(config(name), tmp_path / "parts", resume=True), whole)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "sft"])
def test_pairs_that_are_drawn_are_learned_from(config, reports, tmp_path, loss):
    algorithm = {"loss": loss, "pairs": "online", "beta": 100.0}
    whole = go(config("diffusion_dpo", algorithm=algorithm), tmp_path / "whole")
    ((first,), (second,)) = reports
    assert first.grad_norm > 0 and second.grad_norm > 0
    if loss == "dpo":
        assert first.loss == pytest.approx(math.log(2), abs=1e-6) and first.loss != second.loss
    go(config("diffusion_dpo", rounds=1, algorithm=algorithm), tmp_path / "parts")
    assert same(go(config("diffusion_dpo", algorithm=algorithm), tmp_path / "parts", resume=True), whole)


@pytest.mark.parametrize("name", ["sdpo_stepwise", "flow_grpo", "grpo_guard"])
def test_a_learner_that_computes_otherwise_than_the_rollouts_stops_the_run(config, tmp_path, monkeypatch, name):
    def other(self, forward, velocity, drawn, original=Stepwise.log_ratio):
        return original(self, forward, velocity + 0.01, drawn)

    monkeypatch.setattr(Stepwise, "log_ratio", other)
    done = go(config(name, batch=GROUPS), tmp_path / "run")
    assert isinstance(done.error, DriftError) and "rollout and learner compute differently" in str(done.error)


@pytest.mark.parametrize("name", ["ddpo", "flow_grpo"])
def test_the_rounds_before_it_are_kept_and_a_resumed_run_begins_with_the_one_that_it_stopped(
    config, tmp_path, monkeypatch, name
):
    """Though no checkpoint was due, and though what a prompt's rewards were is known before the learner finds it."""
    three = config(name, rounds=3, batch=GROUPS, checkpoint={"every": 3})
    whole = go(three, tmp_path / "whole")

    def watch(run, live):
        def other(self, forward, velocity, drawn, original=Stepwise.log_ratio):
            return original(self, forward, velocity + 0.01, drawn)

        live.after_round = lambda: monkeypatch.setattr(Stepwise, "log_ratio", other)  # of the second round on

    stopped = go(three, tmp_path / "parts", watch=watch)
    monkeypatch.undo()
    assert isinstance(stopped.error, DriftError) and "--resume --force" in str(stopped.error)
    assert [row["round"] for row in stopped.rows] == [0]
    assert checkpoint.newest(tmp_path / "parts")[0].round == 1
    done = go(three, tmp_path / "parts", resume=True)
    assert "going on after round 1 of 3" in done.notes and same(done, whole)
    one, other = (checkpoint.newest(tmp_path / run)[0] for run in ("whole", "parts"))
    assert one.state["learner"] == other.state["learner"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "ddpo",
            {"algorithm": {"timestep_fraction": 1.0}},
            "needs the density of every trained step.*no noise at step 3",
        ),
        ("ddpo", {"algorithm": {"noise_level": 2.0}}, r"algorithm\.noise_level with kernel ddim"),
        (
            "sdpo_stepwise",
            {"batch": {"images_per_task": 4, "item_size": 2}},
            "images_per_prompt is 1; set it to 2 or more",
        ),
        (
            "pso_pairwise",
            {"batch": {"images_per_task": 4, "item_size": 2}},
            "images_per_prompt is 1; set it to 2 or more",
        ),
        (
            "sdpo_stepwise",
            {"batch": {"images_per_task": 6, "item_size": 3, "images_per_prompt": 3}},
            "compares pairs, and batch.images_per_prompt is 3",
        ),
        ("ddpo", {"rewards": {}}, "rewards is empty"),
        ("ddpo", {"sampling": {"steps": 1}}, "leaves no step to train on"),
    ],
)
def test_what_an_algorithm_cannot_train_on_is_refused(config, tmp_path, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        go(config(name, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddpo", {"algorithm": {"reward_weights": {"compoze": 5}}}, r"reward_weights.compoze: no such reward; known: "),
        ("sdpo_stepwise", {"algorithm": {"buffer": 8}}, "buffer_least 16 is more than buffer 8 ever holds"),
        (
            "ddpo",
            {"algorithm": {"task_weights": {"nope": 3}}, "prompts": {"train": {"a": "x.txt"}}},
            "task_weights.nope: no such task; known: a",
        ),
    ],
)
def test_a_misspelt_weight_is_refused(config, name, changes, message):
    with pytest.raises(ValueError, match=message):
        config(name, **changes)


@pytest.mark.parametrize(
    ("name", "algorithm", "rows"),
    [
        ("ddpo", {}, 8 * 3),  # images and trained steps, one forward each
        ("sdpo_stepwise", {}, 8 * 3),
        ("pso_pairwise", {}, 8 * 3 * 2),  # and the reference
        ("diffusion_dpo", {"pairs": "online"}, 8 * 2 / 2),  # both images of a pair once, unguided; and the reference
        ("diffusion_dpo", {"pairs": "online", "loss": "sft"}, 4 / 2),  # the better image alone
    ],
)
def test_no_forward_is_wasted(config, tmp_path, name, algorithm, rows):
    """Two tasks of four images, four steps of which three are trained on; a guided image is two rows."""
    done = go(config(name, rounds=1, algorithm=algorithm), tmp_path / "run")
    assert done.rows[0]["forwards"] == {"rollout": 8 * 4 * 2, "reward": 0, "learner": rows * 2}


def test_rewards_that_are_all_equal_teach_nothing(config, reports, tmp_path):
    for name in ("ddpo", "sdpo_stepwise", "pso_pairwise"):
        settings = {"rewards": {"tests.commands.scoring:constant": {"probe": "finite"}}}
        go(config(name, rounds=1, **settings), tmp_path / name)
        assert max(report.grad_norm for report in reports[-1]) < 1e-6, name


def test_going_on_with_another_algorithm_begins_its_statistics_anew():
    Ddpo(DdpoConfig(name="ddpo")).load_state_dict({"returns": {"p": [[1.0]]}})
    Sdpo(SdpoConfig(name="sdpo_stepwise")).load_state_dict({"rewards": {"p": [[1.0]]}})


def test_a_reference_that_would_mark_what_nobody_trains_on_is_refused(config):
    with pytest.raises(ValueError, match="two are trained on"):
        teacher = {"reference": {"model": "x", "guidance": 2.0, "tasks": ["a", "b"]}}
        batch = {"images_per_task": 4, "item_size": 4, "images_per_prompt": 4}
        config("pso_pairwise", teachers=teacher, batch=batch)


def test_noise_of_zero_has_no_density(config):
    for name in ALIGNMENT:
        with pytest.raises(ValueError, match=r"noise_level 0 leaves steps without a density.*or use diffusion_nft"):
            config(name, algorithm={"noise_level": 0.0})


def test_pairs_go_through_their_steps_together_and_images_alone(config):
    for name, together in (("sdpo_stepwise", True), ("ddpo", False)):
        algorithm = make_algorithm(config(name, sampling={"steps": 10}))
        work = WorkItem(
            0, "a", 0, 0, tuple(Prompt(str(n // 2), "", "a") for n in range(8)), (0, 1) * 4, tuple(range(9))
        )
        orders = algorithm.orders(work)
        assert all(sorted(row) == list(range(9)) for row in orders.tolist())
        assert torch.equal(orders[::2], orders[1::2]) == together
        assert len({tuple(row) for row in orders.tolist()}) == (4 if together else 8)
        assert algorithm.updates_per_round == 9


def test_the_reference_is_the_adapter_off_or_a_teacher_of_that_name(config, tiny, tmp_path):
    """Another process, another forward batch order, the same numbers."""
    teacher = {"model": str(tiny), "guidance": 2.0, "tasks": ["a", "b"]}
    own = go(config("pso_pairwise"), tmp_path / "own")
    taught = go(config("pso_pairwise", teachers={"reference": teacher}), tmp_path / "taught")
    assert [row["loss"] for row in own.rows] == [row["loss"] for row in taught.rows]
    assert own.result["student_sha256"] == taught.result["student_sha256"]
    assert taught.rows[0]["forwards"]["teacher"] > 0


def test_a_whole_model_is_compared_with_a_teacher_that_is_its_start(config, reports, tiny, tmp_path):
    teacher = {"model": str(tiny), "guidance": 2.0, "tasks": ["a", "b"]}
    whole = {"student": {"lora": None, "guidance": 2.0}}
    go(config("pso_pairwise", teachers={"reference": teacher}, **whole), tmp_path / "run")
    assert max(metric(reports[0][0], "ratio")) == 0 < max(metric(reports[1][0], "ratio"))
    with pytest.raises(ConfigError, match="also needs reference"):
        go(config("pso_pairwise", **whole), tmp_path / "without")


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_in_half_precision_too_the_learner_finds_what_was_drawn(config, reports, tmp_path, lora):
    """Of a whole model the rollouts hold buffers in half precision, which are not sent to them."""
    student = {"lora": lora, "guidance": 2.0}
    go(config("ddpo", rounds=1, precision="bf16", student=student), tmp_path / "run")
    assert max(metric(reports[0][0], "ratio")) == 0 < max(metric(reports[0][-1], "ratio"))


@pytest.mark.parametrize("name", ["ddpo", "opd"])
def test_other_algorithms_have_no_teacher_of_that_name(config, tiny, name):
    with pytest.raises(ValueError, match="teacher name 'reference' is not free"):
        config(name, teachers={"reference": {"model": str(tiny), "tasks": ["a", "b"]}})


def test_a_reference_at_another_guidance_is_refused(config, tiny):
    with pytest.raises(ValueError, match=r"its guidance is student.guidance \(2\)"):
        config("pso_pairwise", teachers={"reference": {"model": str(tiny), "guidance": 1.0, "tasks": ["a", "b"]}})


SMALL = {"resources": {"cpu": 0.25}}


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.parametrize("workers", [1, 2])
def test_pairs_drawn_by_workers_give_the_student_of_one_process_also_where_two_die(
    config, ray_session, tmp_path, workers
):
    """Dense rewards: velocities, three pictures of each image and their shares all travel."""
    killers = []
    many, deaths = SMALL | {"workers": workers}, {"rollout": 1, "reward": 1} if workers > 1 else {}
    done = go(
        config("sdpo_stepwise", "ray", cluster={"rollout": many, "rewards": {"default": many}}),
        tmp_path / "ray",
        watch=lambda run, live: killers.append(Killer(run, deaths)),
    )
    assert len(killers[0].killed) == len(deaths)
    assert same(done, go(config("sdpo_stepwise"), tmp_path / "local"))


@pytest.mark.ray
@pytest.mark.verify
@pytest.mark.parametrize("name", ["sdpo_stepwise", "ddpo"])
def test_two_ranks_see_the_same_statistics_and_agree_with_one(config, ray_session, tmp_path, name):
    alone = go(config(name), tmp_path / "local")
    both = go(config(name, "ray", cluster={"learner": SMALL | {"ranks": 2}}), tmp_path / "ray")
    for row, other in zip(both.rows, alone.rows, strict=True):
        assert row["loss"]["total"] == pytest.approx(other["loss"]["total"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    states = [checkpoint.newest(tmp_path / place)[0].state["learner"]["algorithm"] for place in ("local", "ray")]
    assert states[0].keys() == states[1].keys()
    for key, seen in states[0].items():
        assert seen.keys() == states[1][key].keys(), "every prompt of every rank"
        for prompt, rows in seen.items():
            assert rows == [pytest.approx(row, abs=1e-3) for row in states[1][key][prompt]]
