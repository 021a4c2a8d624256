"""Distillation by PPO as whole runs on the tiny model."""

import pytest

from opd_ray.errors import ConfigError
from tests.runtime.runs import go, metric, same

FORMS = ("differentiable_kl", "per_step", "return_to_go", "sampled")


@pytest.fixture
def ppo(make_config):
    """A run of two rounds by one of the forms."""

    def made(form, runtime="local", rounds=2, **changes):
        algorithm = {"name": "opd_ppo", "form": form, **changes.pop("algorithm", {})}
        return make_config(runtime, rounds=rounds, algorithm=algorithm, **changes)

    return made


@pytest.mark.parametrize("form", ["differentiable_kl", "return_to_go"])
def test_a_run_learns_from_its_first_update_on_and_goes_on_bit_for_bit(ppo, reports, tmp_path, form):
    whole = go(ppo(form), tmp_path / "whole")
    for (report,) in reports:
        assert report.grad_norm > 0
        assert max(metric(report, "ratio")) == 0, "the learner finds exactly what was drawn with"
        assert min(metric(report, "gap")) > 0 and min(metric(report, "kl")) > 0
    go(ppo(form, rounds=1), tmp_path / "parts")
    assert same(go(ppo(form), tmp_path / "parts", resume=True), whole)


def test_the_first_update_has_the_closed_forms_loss_and_another_gradient(ppo, make_config, tmp_path):
    """Same prompts, noise and student, so the same drawings and marks.

    This teacher is so near that a mean log-ratio adds next to nothing: constant costs have little else.
    """
    closed = {"name": "opd", "objective": "kl", "noise_level": 0.7}
    exact = go(make_config(rounds=1, algorithm=closed), tmp_path / "closed").rows[0]
    rows = {form: go(ppo(form, rounds=1), tmp_path / form).rows[0] for form in FORMS}
    for form in ("differentiable_kl", "per_step"):
        assert rows[form]["loss"] == pytest.approx(exact["loss"], rel=1e-4)
    assert rows["return_to_go"]["loss"]["total"] > exact["loss"]["total"]
    for row in rows.values():
        for name in ("gap", "kl"):
            for task, steps in exact[name].items():
                assert row[name][task] == pytest.approx(steps, rel=1e-4)
    sizes = {form: row["grad_norm"] / exact["grad_norm"] for form, row in rows.items()}
    assert sizes["differentiable_kl"] == pytest.approx(1, abs=0.01) and sizes["differentiable_kl"] != 1
    assert 0 < sizes["per_step"] < 0.01 and 0 < sizes["return_to_go"] < 0.01
    assert sizes["sampled"] > 2


def test_later_updates_of_a_round_are_off_the_policy_that_drew(ppo, reports, tmp_path):
    go(ppo("sampled", rounds=1, algorithm={"item_parts": 2, "steps_per_update": 2}), tmp_path / "run")
    (updates,) = reports
    assert [max(metric(one, "ratio")) > 0 for one in updates] == [False, True, True, True]


def test_drawings_of_an_older_policy_are_compared_with_that_one(ppo, reports, tmp_path):
    done = go(ppo("differentiable_kl", cluster={"max_staleness": 1}), tmp_path / "run")
    assert [row["staleness"] for row in done.rows] == [0, 1]
    assert max(metric(reports[0][0], "ratio")) == 0 < max(metric(reports[1][0], "ratio"))


def test_no_forward_is_wasted(ppo, tmp_path):
    """Eight images, the first three of four steps; teacher a is unguided, everybody else's rows are two."""
    done = go(ppo("differentiable_kl", rounds=1), tmp_path / "run")
    assert done.rows[0]["forwards"] == {"rollout": 8 * 3 * 2, "teacher": 4 * 3 + 4 * 3 * 2, "learner": 8 * 3 * 2}


def test_what_does_not_fit_is_refused(ppo, tmp_path):
    with pytest.raises(ConfigError, match="algorithm opd_ppo learns from teachers; teachers is empty"):
        go(ppo("sampled", teachers={}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"or use algorithm opd with objective: mean, which needs no noise"):
        ppo("sampled", algorithm={"noise_level": 0})
    with pytest.raises(ValueError, match="reward_weights"):
        ppo("sampled", algorithm={"reward_weights": {"a": 1.0}})


@pytest.mark.ray
@pytest.mark.verify
def test_workers_give_the_student_of_one_process(ppo, ray_session, tmp_path):
    """Velocities of the policy that drew and of the teachers both travel."""
    done = go(ppo("return_to_go", "ray"), tmp_path / "ray")
    assert same(done, go(ppo("return_to_go"), tmp_path / "local"))
