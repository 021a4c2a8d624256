"""What only a card can show. Skipped where there is none."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.runtime.runs import go, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")

LOCAL = {role: {"resources": {"cpu": 1, "gpu": 1}} for role in ("rollout", "learner")}
LOCAL |= {"teachers": {"default": {"resources": {"cpu": 1, "gpu": 1}}}}
FRACTIONS = {role: {"resources": {"cpu": 1, "gpu": 0.25}} for role in ("rollout", "learner")}
FRACTIONS |= {"teachers": {"default": {"resources": {"cpu": 1, "gpu": 0.25}}}}
"""One card for the rollout, two teachers and the learner."""


def numbers(outcome) -> list[float]:
    return [loss for row in outcome.rows for loss in row["loss"].values()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_a_card_trains_as_one_on_the_processor(make_config, tmp_path, precision) -> None:
    on_card = go(make_config(precision=precision, cluster=LOCAL, rounds=4), tmp_path / "card")
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps a process to one device
    on_processor = go(make_config(precision="fp32", rounds=4), tmp_path / "processor")
    assert all(math.isfinite(loss) and loss > 0 for loss in numbers(on_card))
    tolerance = 1e-3 if precision == "fp32" else 0.1
    assert numbers(on_card) == pytest.approx(numbers(on_processor), rel=tolerance)
    assert on_card.rows[0]["grad_norm"] == pytest.approx(on_processor.rows[0]["grad_norm"], rel=10 * tolerance)


def test_workers_that_share_a_card_are_the_same_run(make_config, tmp_path, ray_session) -> None:
    alone = go(make_config(precision="bf16", cluster=LOCAL), tmp_path / "local")
    shared = go(make_config("ray", precision="bf16", cluster=FRACTIONS), tmp_path / "ray")
    assert same(shared, alone)


def test_a_stopped_run_on_a_card_goes_on_as_if_it_had_not_been(make_config, tmp_path) -> None:
    whole = go(make_config(precision="bf16", cluster=LOCAL, rounds=4), tmp_path / "whole")

    def stop_after_two(run, live) -> None:
        def look() -> None:
            run.stopping = run.round >= 2

        live.after_round = look

    config = make_config(precision="bf16", cluster=LOCAL, rounds=4)
    first = go(config, tmp_path / "stopped", watch=stop_after_two)
    assert first.error is not None
    assert same(go(config, tmp_path / "stopped", resume=True), whole)


def test_rollouts_prove_weights_across_cards_and_processors(make_config, tmp_path, ray_session) -> None:
    """The learner on the card, the rollout on the processor: the probe is compared over both kinds of arithmetic."""
    mixed = FRACTIONS | {"rollout": {"resources": {"cpu": 1}}}
    done = go(make_config("ray", precision="fp32", cluster=mixed), tmp_path / "run")
    assert done.error is None
    assert all(math.isfinite(loss) for loss in numbers(done))
