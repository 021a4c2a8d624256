"""On-policy distillation through a real (tiny, random) SD3: what is zero, what adds up, who is asked for what."""

from dataclasses import replace

import pytest
import torch

from opd_ray.actors import TeacherActor
from opd_ray.algorithms.opd import Opd
from opd_ray.config import OpdConfig, TeacherConfig
from opd_ray.errors import NotFiniteError
from opd_ray.types import Experience, TeacherAnswer, Trajectory
from tests.algorithms.parts import (
    TEXTS,
    VERSION,
    bind,
    fill,
    flat,
    gradients,
    item,
    learner,
    load,
    on,
    random_experience,
    rollout_actor,
    stage,
    write_loras,
)


@pytest.fixture(scope="module")
def family(tiny):
    return load(tiny)


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    return write_loras(tiny, tmp_path_factory.mktemp("loras"), ["one", "two"])


def updated(tiny, experience, **options):
    one = learner(tiny, Opd(OpdConfig(**options)))
    fill(one.family, "student", 9)
    stage(one, experience)
    return one, one.update(0)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_teacher_that_is_the_student_teaches_exactly_nothing(tiny, loras, guidance):
    drawing = rollout_actor(tiny, guidance=guidance)
    weights = fill(drawing.family, "student", 1)  # what the file of teacher `one` holds
    sha256 = bind(drawing, 1)
    path = drawing.draw(item(), VERSION, sha256)
    teacher = TeacherActor(on(load(tiny)), {"one": TeacherConfig(lora=loras["one"], guidance=guidance)})
    one = learner(tiny, Opd(OpdConfig()), guidance=guidance)
    fill(one.family, "student", 1)
    assert torch.equal(flat(one.student), flat(weights))
    stage(one, [Experience(path.item, path, teacher.score(path, "one"))])
    report = one.update(0)
    assert report.loss == 0.0 and report.grad_norm == 0.0
    assert not flat(gradients(one)).any()
    other = TeacherActor(on(load(tiny)), {"two": TeacherConfig(lora=loras["two"], guidance=guidance)})
    stage(one, [Experience(path.item, path, other.score(path, "two"))])
    assert one.update(0).loss > 0


def test_the_gradient_over_tasks_is_that_of_one_concatenated_batch(tiny, family):
    parts = [random_experience(family, item(task=task, position=n), seed=n) for n, task in enumerate("abc")]
    paths, answers = [part.trajectory for part in parts], [part.answer for part in parts]
    whole = item([text for part in parts for text in (p.text for p in part.item.prompts)])
    path = Trajectory(
        whole,
        VERSION,
        paths[0].sigmas,
        torch.cat([one.latents for one in paths]),
        {name: torch.cat([one.cond[name] for one in paths]) for name in paths[0].cond},
        paths[0].uncond,
    )
    same_empty = [
        Experience(one.item, replace(p, uncond=path.uncond), one.answer) for one, p in zip(parts, paths, strict=True)
    ]
    accumulated, report = updated(tiny, same_empty)
    answer = TeacherAnswer("t", answers[0].steps, torch.cat([one.velocity for one in answers]))
    together, expected = updated(tiny, [Experience(whole, path, answer)])
    assert report.loss == pytest.approx(expected.loss, rel=1e-6)
    ours, theirs = flat(gradients(accumulated)), flat(gradients(together))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_order_changes_nothing_but_rounding_and_the_same_order_changes_not_a_bit(tiny, family):
    work = [item(task="a"), item(TEXTS[2:], task="a", index=1, position=1), item(task="b", position=2)]
    parts = [random_experience(family, one, seed=n) for n, one in enumerate(work)]
    first, report = updated(tiny, parts, task_weights={"a": 2.0})
    again, same = updated(tiny, parts, task_weights={"a": 2.0})
    assert report == same and torch.equal(flat(gradients(first)), flat(gradients(again)))
    assert torch.equal(flat(first.student), flat(again.student))
    turned, other = updated(tiny, parts[::-1], task_weights={"a": 2.0})
    assert other.loss == pytest.approx(report.loss, rel=1e-6)
    ours, theirs = flat(gradients(turned)), flat(gradients(first))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_the_total_is_the_weighted_mean_of_means(tiny, family):
    work = [item(task="a", steps=(0, 1)), item(task="a", index=1, position=1, steps=(0, 2)), item(task="b", position=2)]
    parts = [random_experience(family, one, seed=n) for n, one in enumerate(work)]
    _, report = updated(tiny, parts, loss_target="v", task_weights={"a": 3.0})
    gaps = {task: {s: m["gap"] for s, m in by_step.items()} for task, by_step in report.steps.items()}
    assert {task: {step: times for step, (_, times) in found.items()} for task, found in gaps.items()} == {
        "a": {0: 2, 1: 1, 2: 1},
        "b": {0: 1, 1: 1},
    }
    totals = {task: 0.5 * sum(gap for gap, _ in found.values()) / 2 for task, found in gaps.items()}
    assert report.tasks["a"] == (pytest.approx(totals["a"]), 2)  # a sum over the task's two items
    assert report.tasks["b"] == (pytest.approx(totals["b"]), 1)
    assert report.loss == pytest.approx(0.75 * totals["a"] / 2 + 0.25 * totals["b"])


def test_guidance_sends_the_gradient_through_both_branches(tiny, family):
    g, alone = 3.0, random_experience(family, item(steps=(1,)))
    one = learner(tiny, Opd(OpdConfig(loss_target="v")), guidance=g)
    fill(one.family, "student", 9)
    stage(one, [alone])
    one.update(0)
    ours = gradients(one)
    path, target = alone.trajectory, alone.answer.velocity[:, 0]
    twin = learner(tiny)
    fill(twin.family, "student", 9)
    uncond = {name: value.expand(2, *value.shape[1:]) for name, value in path.uncond.items()}
    given, without = (
        twin.family.velocity(path.latents[:, 1], float(path.sigmas[1]), cond, {}, 1) for cond in (path.cond, uncond)
    )
    residual = (g * given - (g - 1) * without - target).detach() / target.numel()
    # d/d theta 1/2 mean (v - target)^2 = residual . (g grad v_cond - (g - 1) grad v_uncond)
    (residual * (g * given - (g - 1) * without)).sum().backward()
    clip = min(1.0, 1.0 / float(flat(gradients(twin)).norm()))
    for name, expected in gradients(twin).items():
        torch.testing.assert_close(ours[name], expected * clip, rtol=1e-3, atol=1e-6)


def test_the_teacher_is_asked_at_its_own_guidance_and_for_the_trained_steps_alone(tiny, family, loras):
    configs = {
        "plain": TeacherConfig(lora=loras["one"], guidance=1.0),
        "guided": TeacherConfig(lora=loras["one"], guidance=4.5),
    }
    teacher = TeacherActor(on(load(tiny)), configs)
    path = random_experience(family, item(steps=(0, 2))).trajectory
    plain = teacher.score(path, "plain")
    assert teacher.forwards == 2 * 2  # rows x steps
    guided = teacher.score(path, "guided")
    assert teacher.forwards == 2 * 2 + 2 * 2 * 2  # a guided row counts twice
    assert plain.steps == (0, 2) and plain.velocity.shape == (2, 2, *family.latent_shape)
    with teacher.families["plain"].adapter("plain"), torch.no_grad():
        x, t = path.latents[:, 2], float(path.sigmas[2])
        assert torch.equal(plain.velocity[:, 1], teacher.families["plain"].velocity(x, t, path.cond, {}, 1))
        assert torch.equal(guided.velocity[:, 1], teacher.families["plain"].velocity(x, t, path.cond, path.uncond, 4.5))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_forwards_of_an_update_equal_the_closed_form(tiny, family, guidance):
    parts = [random_experience(family, item(task=task, position=n, steps=(0, 2))) for n, task in enumerate("ab")]
    one = learner(tiny, Opd(OpdConfig()), guidance=guidance)
    stage(one, parts)
    one.update(0)
    rows, branches = 2, 1 if guidance == 1 else 2
    assert one.family.forwards == 2 * 2 * rows * branches  # tasks x steps x rows x branches


def test_the_student_still_learns_after_other_adapters_were_used(tiny, family):
    """PEFT's own activation would have switched the student's requires_grad off: a loss without a graph."""
    one = learner(tiny)
    one.family.add_lora("other", one.training.lora, 0)
    other = one.family.adapter_parameters("other").values()
    for name in ("other", None):
        with one.family.adapter(name):
            assert all(parameter.requires_grad for parameter in one.student.values())
            assert not any(parameter.requires_grad for parameter in other)
    one.probe()
    stage(one, [random_experience(family, item())])
    assert one.update(0).grad_norm > 0
    assert not any(parameter.requires_grad for parameter in other)


@pytest.mark.parametrize("value", [float("nan"), 1e20], ids=["nan", "overflow"])
def test_a_loss_that_is_not_finite_changes_no_weight(tiny, family, value):
    one = learner(tiny)
    fill(one.family, "student", 9)
    bad = random_experience(family, item(position=1, index=1))
    bad.answer.velocity[0, 1] = value  # its square is infinite where its gradient is not
    stage(one, [random_experience(family, item()), bad])
    before = flat(one.student).clone()
    with pytest.raises(NotFiniteError, match=r"first in round 0 a\[1\] step 1, prompt 'a red cat'; no weight was ch"):
        one.update(0)
    assert torch.equal(flat(one.student), before)
    assert one.updates == 0 and not one.engine.optimizer.state
    stage(one, [random_experience(family, item())])
    assert one.update(0).loss > 0  # the broken gradient is gone
