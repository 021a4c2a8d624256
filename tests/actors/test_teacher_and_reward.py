import math
from dataclasses import replace

import pytest
import torch

from opd_ray.actors import RewardActor, TeacherActor
from opd_ray.config import TeacherConfig
from opd_ray.errors import ModelError, NotFiniteError
from opd_ray.rewards import Scorer, make_rewards
from opd_ray.types import Prompt
from tests.algorithms.parts import TEXTS, flat, item, load, on, random_experience, write_loras

NAN = float("nan")


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    paths = write_loras(tiny, tmp_path_factory.mktemp("loras"), ["one", "two"])
    configs = {name: TeacherConfig(lora=path, guidance=2) for name, path in paths.items()}
    return TeacherActor(on(load(tiny)), configs)


@pytest.fixture(scope="module")
def path(teacher):
    return random_experience(teacher.families["one"], item(TEXTS[:3], round=6, steps=(1, 3))).trajectory


def test_teachers_that_share_a_base_answer_as_they_would_alone(teacher, path):
    one, two, again = (teacher.score(path, name) for name in ("one", "two", "one"))
    assert torch.equal(one.velocity, again.velocity)
    assert not torch.equal(one.velocity, two.velocity)
    assert (one.teacher, one.steps, two.teacher) == ("one", (1, 3), "two")
    assert teacher.families["one"].active is None  # as before the question


def test_facts_hold_guidance_and_the_bound_file(teacher):
    facts = teacher.facts["two"]
    assert facts.guidance == 2
    assert (facts.lora.rank, facts.lora.alpha) == (4, 8)
    assert facts.lora.tensors == len(teacher.families["one"].adapter_parameters("two"))
    assert facts.lora.sha256 != teacher.facts["one"].lora.sha256


def test_an_answer_that_is_not_finite_names_teacher_round_and_prompt(teacher, path):
    bad = replace(path, latents=path.latents.clone())
    bad.latents[1, 3] = NAN
    with pytest.raises(NotFiniteError, match=r"teacher two .* in round 6 for 1 prompts, first 'two blue dogs'; check"):
        teacher.score(bad, "two")
    bad.latents[0, 0] = NAN  # a step that is not asked for
    with pytest.raises(NotFiniteError, match="for 1 prompts"):
        teacher.score(bad, "two")


def test_another_schedule_is_refused(teacher, path):
    bad = replace(path, sigmas=path.sigmas * 0.99)
    with pytest.raises(ModelError, match="teacher one's sigma schedule is not the trajectory's"):
        teacher.score(bad, "one")


def test_a_teacher_carries_no_gradient(teacher, path):
    assert not teacher.score(path, "one").velocity.requires_grad
    assert not any(p.requires_grad for p in teacher.families["one"].network.parameters())
    assert flat(teacher.families["one"].adapter_parameters("one")).abs().max() > 0


IMAGES = torch.stack([torch.full((3, 4, 4), value) for value in (0.25, 0.75)])


def prompts_of(*texts):
    return [Prompt(text, text, "any") for text in texts]


def brightness(images, prompts, *, power=1.0):
    return images.mean(dim=(1, 2, 3)) ** power


class Prompted:
    def __init__(self, word):
        self.word = word

    def __call__(self, images, prompts):
        return [1.0 if self.word in prompt else NAN for prompt in prompts]


def test_rewards_are_functions_or_objects_each_with_its_arguments():
    made = make_rewards(
        {f"{__name__}:brightness": {"power": 2}, f"{__name__}:Prompted": {"word": "cat"}},
    )
    scored = RewardActor(made).score(IMAGES, prompts_of("a cat", "a dog"))
    assert scored.scores[f"{__name__}:brightness"] == [0.0625, 0.5625] and not scored.errors
    prompted = scored.scores[f"{__name__}:Prompted"]
    assert prompted[0] == 1 and math.isnan(prompted[1])  # NaN: it does not apply


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            torch.ones(2, 1),
            r"mine answered shape \[2, 1\]; expected a number for each picture \(shape \[2\]\); mend",
        ),
        (torch.ones(3), r"reward mine answered shape \[3\]"),
        (1.0, r"reward mine answered shape \[\]"),
        (["a", "b"], r"reward mine answered \['a', 'b'\]; expected a number for each picture"),
        (None, r"reward mine answered None; expected a number for each picture"),
        ([1.0, float("inf")], "reward mine answered infinity; NaN is for"),
    ],
)
def test_answers_that_are_no_scores_are_refused_by_name(answer, message):
    with pytest.raises(ValueError, match=message):
        RewardActor({"mine": Scorer("mine", lambda images, prompts: answer)}).score(IMAGES, prompts_of("a", "b"))
