import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from opd_ray.diffusion import choose_steps, flow_sigmas, trained_steps

# arXiv 2605.15055's setting: SD3.5, ten steps, shift 3.
GOLDEN = [
    1,
    0.960129,
    0.913349,
    0.857692,
    0.790368,
    0.707278,
    0.602151,
    0.464876,
    0.278049,
    0.008929,
    0,
]


def test_golden_schedule():
    sigmas = flow_sigmas(10, 3.0)
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx(GOLDEN, abs=5e-7)


@pytest.mark.parametrize("num_train_timesteps", [1000, 500])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 2.0, 3.0, 3.7, 7.3, 12.0])
def test_equals_diffusers_bit_for_bit(shift: float, num_train_timesteps: int):
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=num_train_timesteps, shift=shift)
    for num_steps in (1, 2, 3, 4, 7, 10, 28, 40, 50, 200):
        theirs.set_timesteps(num_steps)
        ours = flow_sigmas(num_steps, shift, num_train_timesteps=num_train_timesteps)
        assert torch.equal(ours, theirs.sigmas), (num_steps, shift)
        assert ours[0] == 1
        assert (ours.diff() < 0).all()


@pytest.mark.parametrize(("num_steps", "shift", "clock"), [(0, 3.0, 1000), (10, 0.0, 1000), (10, 3.0, 0)])
def test_impossible_schedules_are_refused(num_steps: int, shift: float, clock: int):
    with pytest.raises(ValueError, match="num_steps >= 1, shift > 0"):
        flow_sigmas(num_steps, shift, num_train_timesteps=clock)


def test_the_default_leaves_out_the_last_of_ten_steps():
    assert trained_steps(10) == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert trained_steps(10, 1.0) == tuple(range(10))
    assert trained_steps(40, 0.25) == tuple(range(10))


@pytest.mark.parametrize(("num_steps", "fraction"), [(10, 0.05), (1, 0.99), (10, 0.0), (10, 1.1)])
def test_training_no_step_is_refused(num_steps: int, fraction: float):
    with pytest.raises(ValueError, match="at least one"):
        trained_steps(num_steps, fraction)


def test_chosen_steps_are_a_sorted_subset_that_the_seed_alone_decides():
    steps = (2, 3, 5, 7, 11, 13)
    state = torch.get_rng_state()
    drawn = [choose_steps(steps, 3, seed) for seed in range(50)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn == [choose_steps(steps, 3, seed) for seed in range(50)]
    for chosen in drawn:
        assert len(set(chosen)) == 3
        assert list(chosen) == sorted(chosen)
        assert set(chosen) <= set(steps)
    assert len(set(drawn)) > 10
    assert set().union(*drawn) == set(steps)


def test_choosing_all_or_nothing():
    assert choose_steps((0, 1, 2), None, 0) == (0, 1, 2)
    assert choose_steps((0, 1, 2), 3, 0) == (0, 1, 2)
    assert choose_steps((2, 0, 1), 7, 0) == (0, 1, 2)
    with pytest.raises(ValueError, match="at least 1"):
        choose_steps((0, 1, 2), 0, 0)
