"""Rounds of one task each: what they draw, how they go on, and who is refused."""

import pytest

from opd_ray.errors import ConfigError
from opd_ray.planning.rates import Rates
from tests.runtime.runs import go, same

IN_TURN = {"images_per_task": 4, "item_size": 2, "tasks": "in_turn"}


def test_a_run_of_tasks_in_turn_goes_on_in_the_middle_of_a_turn(make_config, tmp_path):
    """Three trained steps: teacher a is unguided, everybody else's rows are two."""
    whole = go(make_config(batch=IN_TURN, rounds=4), tmp_path / "whole")
    assert [set(row["loss"]) - {"total"} for row in whole.rows] == [{"a"}, {"b"}] * 2
    assert [row["forwards"]["teacher"] for row in whole.rows] == [4 * 2, 4 * 2 * 2] * 2
    assert all(row["loss"]["total"] > 0 and row["grad_norm"] > 0 for row in whole.rows)
    go(make_config(batch=IN_TURN, rounds=3), tmp_path / "parts")
    assert same(go(make_config(batch=IN_TURN, rounds=4), tmp_path / "parts", resume=True), whole)
    with pytest.raises(ConfigError, match="plan with `together`"):
        Rates.from_run(tmp_path / "whole")
    assert "Loss by task" in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None, "recorded": "x"}, r"batch.tasks in_turn is of what is drawn"),
        ({"algorithm": {"name": "opd", "task_weights": {"a": 2.0}}}, "task_weights weigh the tasks of one round"),
        ({"cluster": {"runtime": "ray", "learner": {"ranks": 3}}}, "a round has fewer work items than ranks"),
    ],
)
def test_what_does_not_take_turns_is_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(batch=IN_TURN, **changes)
