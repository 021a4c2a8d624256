"""A reward proves itself before its first number counts, and a failure is no number."""

import math
import time

import pytest
import torch

from opd_ray.actors import RewardActor
from opd_ray.errors import ConfigError, RewardError
from opd_ray.rewards import REWARDS, Probe, Scorer, make_rewards, probed
from opd_ray.rewards.base import check_rewards
from opd_ray.types import Prompt

WHITE, BLACK = torch.ones(3, 8, 8), torch.zeros(3, 8, 8)
BRIGHT = "tests.commands.scoring:brightness"


def prompts_of(*texts):
    return [Prompt(text, text, "any") for text in texts]


def reward_of(answer):
    """Gives the better picture of its only pair one number and the worse one another."""

    @probed(lambda: [Probe((WHITE, "white"), (BLACK, "black"))])
    def mine(images, prompts):
        return torch.tensor([answer[prompt] for prompt in prompts])

    return Scorer("mine", mine)


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        (0.0, 0.0, r"it scores the better picture \('white'\) the same, 0, the worse one \('black'\) 0\. Mend"),
        (0.2, 0.7, r"it scores the better picture \('white'\) 0.2, the worse one \('black'\) 0.7"),
        (math.nan, 0.7, r"'white'\) nan, the worse"),
        (0.2, math.nan, r"'black'\) nan"),
        (math.inf, 0.1, "reward mine answered infinity"),
    ],
)
def test_what_ranks_nothing_or_wrongly_is_refused_by_name(better, worse, said):
    with pytest.raises(RewardError, match=said):
        reward_of({"white": better, "black": worse}).prove()
    assert reward_of({"white": 0.3, "black": 0.2}).prove() == "ranks 1 probe pair"


def test_what_has_no_pairs_has_to_say_so():
    def mine(images, prompts):
        return images.mean((1, 2, 3))

    with pytest.raises(RewardError, match=r"rewards.mine: it has no probes\(\) .* or say probe: finite"):
        Scorer("mine", mine).prove()
    assert Scorer("mine", mine, finite=True).prove() == "finite"
    with pytest.raises(RewardError, match=r"answers NaN, .* for each of 2 prompts, first 'a'"):
        Scorer("mine", lambda images, prompts: torch.full((1,), math.nan), finite=True).prove(prompts_of("a", "b"))
    late = Scorer("mine", lambda images, prompts: torch.tensor([math.nan if prompts == ["a"] else 1.0]), finite=True)
    assert late.prove(prompts_of("a", "b")) == "finite", "one prompt that it applies to is enough"
    with pytest.raises(ConfigError, match=r"rewards\..*brightness\.probe: 'none'; expected finite"):
        check_rewards({BRIGHT: {"probe": "none"}}, {}, [])
    with pytest.raises(RewardError, match=r"greenness: it has no probes\(\)"):
        check_rewards({"tests.commands.scoring:greenness": {}}, {}, [])
    check_rewards({"not.installed:here": {}}, {}, [], elsewhere=["not.installed:here"])


def test_a_probe_that_raises_names_its_reward():
    def broken(images, prompts):
        raise OSError("no such model")

    with pytest.raises(RewardError, match=r"rewards.mine: its probe raised OSError: no such model\. Mend it"):
        RewardActor({"mine": Scorer("mine", broken, finite=True)}).prove()


def test_every_reward_of_the_world_ranks_its_pairs():
    names = [name for name, path in REWARDS.items() if ".world." in path]
    assert len(names) == 4
    for name, scorer in make_rewards({name: {} for name in names}).items():
        assert scorer.prove().startswith("ranks "), name


def test_a_reward_that_asks_for_it_gets_each_prompts_metadata_and_its_device():
    class Told:
        def __init__(self, device="cpu"):
            self.device = device

        def __call__(self, images, prompts, metadata):
            return torch.tensor([float(one.get("count", -1)) for one in metadata])

    prompts = [Prompt("a", "a", "any", {"count": 3}), Prompt("b", "b", "any")]
    scorer = Scorer("told", Told(), finite=True)
    assert RewardActor({"told": scorer}).score(torch.rand(2, 3, 4, 4), prompts).scores == {"told": [3.0, -1.0]}
    assert scorer(torch.rand(1, 3, 4, 4), ["a"]).tolist() == [-1.0]


class Flaky:
    """Cannot score pictures of `bad`, and fails at the first so many calls whatever they hold."""

    def __init__(self, failing=0):
        self.left, self.calls = failing, []

    def __call__(self, images, prompts):
        self.calls.append(list(prompts))
        if self.left:
            self.left -= 1
            raise TimeoutError("no answer\nin time")
        if "bad" in prompts:
            raise ValueError("cannot be scored")
        return images.mean((1, 2, 3))


def test_a_picture_that_cannot_be_scored_is_set_aside_and_takes_no_other_with_it(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    images, flaky = torch.rand(4, 3, 4, 4), Flaky()
    actor = RewardActor({"flaky": Scorer("flaky", flaky, finite=True)}, batch=3, retries=2)
    found = actor.score(images, prompts_of("a", "bad", "b", "c"))
    means = images.mean((1, 2, 3)).tolist()
    assert [found.scores["flaky"][row] for row in (0, 2, 3)] == pytest.approx([means[0], means[2], means[3]])
    assert math.isnan(found.scores["flaky"][1])
    assert found.errors == {"flaky": {1: "ValueError: cannot be scored"}}
    assert flaky.calls == [["a", "bad", "b"], ["a"], ["bad"], ["bad"], ["b"], ["c"]]


def test_without_retries_a_bad_picture_still_takes_no_other_with_it(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    flaky = Flaky()
    actor = RewardActor({"flaky": Scorer("flaky", flaky, finite=True)})
    found = actor.score(torch.ones(2, 3, 4, 4), prompts_of("bad", "a"))
    assert found.errors == {"flaky": {0: "ValueError: cannot be scored"}} and found.scores["flaky"][1] == 1.0
    assert flaky.calls == [["bad", "a"], ["bad"], ["a"]]
    assert actor.score(torch.ones(1, 3, 4, 4), prompts_of("bad")).errors["flaky"].keys() == {0}
    assert flaky.calls[3:] == [["bad"]], "alone it was tried"


def test_what_fails_once_is_tried_again(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    actor = RewardActor({"flaky": Scorer("flaky", Flaky(failing=2), finite=True)}, retries=2)
    found = actor.score(torch.ones(1, 3, 4, 4), prompts_of("a"))
    assert found.scores == {"flaky": [1.0]} and not found.errors
    assert slept == [0.1, 0.4]
    actor = RewardActor({"flaky": Scorer("flaky", Flaky(failing=9), finite=True)}, retries=1)
    found = actor.score(torch.ones(1, 3, 4, 4), prompts_of("a"))
    assert found.errors == {"flaky": {0: "TimeoutError: no answer"}}
