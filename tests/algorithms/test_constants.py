"""Published constants, and what a round's number changes, by arithmetic that a reader can redo."""

import pytest
import torch

from opd_ray.algorithms import Facts
from opd_ray.algorithms.advantages import group_advantages
from opd_ray.algorithms.dmd import Dmd
from opd_ray.algorithms.flow_grpo import FlowGrpo
from opd_ray.algorithms.nft import DiffusionNft, branch_errors
from opd_ray.config import DmdConfig, FlowGrpoConfig, NftConfig
from opd_ray.types import Experience, Prompt, TeacherAnswer, Trajectory, WorkItem
from tests.algorithms.parts import VERSION

FACTS = Facts(seed=3, num_steps=8, images_per_prompt=2)
PROMPTS = (Prompt("p", "p", "a"),) * 4
STEPS = tuple(range(7))


@pytest.mark.parametrize(("part", "stops"), [(0.09, False), (0.11, True)])
def test_rollout_and_learner_may_differ_by_a_tenth_of_the_clip_range(part, stops):
    algorithm = FlowGrpo(FlowGrpoConfig(name="flow_grpo", clip_range=0.5))
    algorithm.facts = FACTS
    algorithm.observe([(work(0), {"x": torch.tensor([0.0, 1.0, 0.0, 1.0])})])
    forward = next(iter(algorithm.forwards(experience(0), 0)))
    _, refused = algorithm.drift(forward, torch.tensor([0.0, -part * 0.5]), 0.5)
    assert (refused is not None) == stops


def test_an_advantage_is_divided_by_the_deviation_and_a_ten_thousandth():
    """Of 0 and 2e-4 the deviation is as small: a half each."""
    found, _ = group_advantages(PROMPTS[:2], torch.tensor([0.0, 2e-4]), per_prompt=False)
    assert found.tolist() == pytest.approx([-0.5, 0.5], rel=1e-5)


def test_an_error_is_divided_by_a_hundred_thousandth_at_least():
    """A gap of 1e-6 throughout: 1e-12 / 1e-5."""
    same = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    errors = branch_errors(same, same, same + 1e-6, 1.0, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert [error.item() for error in errors] == pytest.approx([1e-7, 1e-7])


def work(round):
    return WorkItem(round, "a", 0, 0, PROMPTS, (0, 1, 2, 3), STEPS)


def experience(round):
    """The same drawings in every round."""
    item, rng = work(round), torch.Generator().manual_seed(0)
    latents = torch.randn(4, 9, 2, 2, 2, generator=rng)
    path = Trajectory(item, VERSION, torch.linspace(1, 0, 9), latents, {}, {}, velocities=latents[:, :8])
    return Experience(item, path, TeacherAnswer("t", STEPS, latents[:, :7]))


def seen(algorithm, round):
    """Times, noises and orders of a round: where the student, or `fake`, is asked, and for what."""
    algorithm.facts = FACTS
    algorithm.observe([(work(round), {"x": torch.tensor([0.0, 1.0, 0.0, 1.0])})])
    forwards = list(algorithm.forwards(experience(round), 0))
    times = torch.stack([torch.as_tensor(one.t).expand(4) for one in forwards])
    return {"times": times, "target": torch.stack([one.inputs["target"] for one in forwards if "target" in one.inputs])}


@pytest.mark.parametrize("what", ["times", "target"])
@pytest.mark.parametrize(
    ("kind", "config"), [(DiffusionNft, NftConfig(name="diffusion_nft")), (Dmd, DmdConfig(name="dmd"))]
)
def test_a_round_has_times_and_noises_of_its_own(kind, config, what):
    first, again, second = (seen(kind(config), round)[what] for round in (0, 0, 1))
    assert torch.equal(first, again)
    assert not any(torch.equal(one, other) for one, other in zip(first.unbind(1), second.unbind(1), strict=True))


def test_a_round_goes_through_the_steps_in_an_order_of_its_own():
    algorithm = FlowGrpo(FlowGrpoConfig(name="flow_grpo", shuffle_steps=True))
    algorithm.facts = FACTS
    first, second = (algorithm.orders(work(round)) for round in (0, 1))
    assert torch.equal(first, algorithm.orders(work(0))) and not torch.equal(first, second)
    assert first.sort().values.tolist() == second.sort().values.tolist() == [list(STEPS)] * 4
