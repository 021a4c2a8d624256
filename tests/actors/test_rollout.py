"""The rollout actor against a loop written by hand, and the names of its noise."""

import math
from dataclasses import replace

import pytest
import torch

from opd_ray.actors import SampleRequest
from opd_ray.diffusion import flow, flow_sigmas
from opd_ray.digest import checksum, digest
from opd_ray.errors import ModelError, NotFiniteError, StaleWeightsError
from opd_ray.seeds import fold, noise
from opd_ray.storage.packing import join_trajectories, pack_trajectory, unpack_trajectory
from opd_ray.types import Prompt, WeightVersion, WorkItem
from tests.algorithms.parts import LORA, TEXTS, VERSION, bind, give, item, load, prompt, rollout_actor, write_loras


@pytest.fixture(scope="module")
def whole(tiny):
    """One loaded model; each actor of this module puts its own adapter on it."""
    return load(tiny, whole=True)


@pytest.fixture
def actor(tiny, whole):
    def make(**changes):
        made = rollout_actor(tiny, family=whole, **changes)
        made.sha256 = bind(made)
        return made

    yield make
    whole.use(None)
    for name in whole.adapters:
        whole.remove_adapter(name)


def draw(actor, work):
    return actor.draw(work, VERSION, actor.sha256)


def by_hand(whole, work, *, noise_level, guidance=1.5, seed=7, num_steps=4):
    """Equations 5-9 over the same model: x_{t'} = mu + std eps with named noise."""
    ids = [(one.id, sample) for one, sample in zip(work.prompts, work.samples, strict=True)]
    cond, uncond = whole.encode([one.text for one in work.prompts]), whole.encode([""])
    sigmas = flow_sigmas(num_steps, 3.0)
    x = noise([fold(seed, "init_noise", work.round, *one) for one in ids], whole.latent_shape)
    states = [x]
    for j in range(num_steps):
        t, t_next = float(sigmas[j]), float(sigmas[j + 1])
        with torch.no_grad():
            step = flow(x, whole.velocity(x, t, cond, uncond, guidance), t, t_next, noise_level)
        eps = noise([fold(seed, "step_noise", work.round, *one, j) for one in ids], whole.latent_shape)
        x = step.mean + step.std * eps if noise_level else step.mean
        states.append(x)
    return torch.stack(states, 1)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_a_path_is_that_of_the_loop_written_by_hand(actor, whole, noise_level):
    one = actor(noise_level=noise_level)
    work = item(round=3)
    path = draw(one, work)
    assert torch.equal(path.latents, by_hand(whole, work, noise_level=noise_level))
    assert path.latents.shape == (2, 5, 16, 8, 8) and not path.latents.requires_grad
    assert path.weights == VERSION and path.item is work
    assert torch.equal(path.sigmas, flow_sigmas(4, 3.0))
    for name, expected in whole.encode(TEXTS[:2]).items():
        assert torch.equal(path.cond[name], expected)
        assert path.uncond[name].shape == (1, *expected.shape[1:])


def test_a_row_does_not_depend_on_its_place_or_its_neighbours(actor):
    one = actor(noise_level=0.7)
    first = draw(one, item(TEXTS[:3]))
    other = draw(one, item([TEXTS[3], TEXTS[0], TEXTS[2]]))
    assert torch.equal(first.latents[0], other.latents[1])
    assert torch.equal(first.latents[2], other.latents[2])
    assert not torch.equal(first.latents[1], other.latents[0])


def test_noise_is_named_by_seed_round_prompt_and_sample_alone(tiny, actor):
    one = actor(noise_level=0.7)
    work = item(round=2)
    base = draw(one, work)

    def changed(**fields):
        names = ("round", "task", "index", "position", "prompts", "samples", "steps")
        return draw(one, WorkItem(**({name: getattr(work, name) for name in names} | fields)))

    for same in ({"index": 5}, {"position": 7}, {"steps": (2,)}, {"task": "b"}):
        assert torch.equal(changed(**same).latents, base.latents), same
    renamed = tuple(Prompt("x" + p.id, p.text, p.task) for p in work.prompts)
    for other in ({"round": 3}, {"samples": (1, 1)}, {"prompts": renamed}):
        path = changed(**other)
        assert not (path.latents[:, 0] == base.latents[:, 0]).all(dim=(1, 2, 3)).any(), other
    one.policy = type(one.policy)(**{n: getattr(one.policy, n) for n in one.policy.__slots__} | {"seed": 8})
    assert not torch.equal(draw(one, work).latents[:, 0], base.latents[:, 0])


def test_negatives_travel_only_if_somebody_needs_them(actor):
    path = draw(actor(guidance=1.0, negatives=False), item())
    assert path.uncond == {}


def test_pictures_are_the_decoded_last_states(actor, whole):
    one = actor()
    path = draw(one, item())
    images = one.decode(path)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images, whole.decode(path.latents[:, -1]))


def request(model, lora=None, guidance=1.5, weights=None):
    return SampleRequest(model, lora, guidance, 4, 7, (prompt(TEXTS[0]), prompt(TEXTS[1])), (0, 0), weights)


def test_pictures_of_all_models_begin_at_the_same_noise(tiny, actor, whole, tmp_path):
    paths = write_loras(tiny, tmp_path, ["one"])
    one = actor()
    drawn = {}
    for name, lora in [("base", None), ("student", None), ("one", (paths["one"], None, None, None))]:
        starts = []
        predict = whole.predict
        whole.predict = lambda x, *rest, starts=starts, predict=predict: (starts.append(x), predict(x, *rest))[1]
        drawn[name] = one.sample(request(name, lora, weights=(VERSION, one.sha256)))
        del whole.predict
        first = noise([fold(7, "eval", p.id, 0) for p in request(name).prompts], whole.latent_shape)
        assert torch.equal(starts[0], torch.cat([first, first])), name
    assert not torch.equal(drawn["base"], drawn["student"])
    assert not torch.equal(drawn["base"], drawn["one"])
    assert not torch.equal(drawn["student"], drawn["one"])
    assert whole.active == "student"
    assert torch.equal(one.sample(request("student", weights=(VERSION, one.sha256))), drawn["student"])


def test_pictures_of_the_base_are_those_of_a_model_without_adapters(actor, tiny):
    from opd_ray.actors.rollout import draw_pictures

    drawn = actor().sample(request("base"))
    assert torch.equal(drawn, draw_pictures(load(tiny, whole=True), request("base")))


def test_only_weights_that_were_proven_are_drawn_with(actor):
    one = actor()
    weights = {name: p.detach().clone() for name, p in one.family.adapter_parameters("student").items()}
    newer, name = WeightVersion(0, 0, 1), min(weights)
    with pytest.raises(StaleWeightsError, match=r"round 0 a\[0\] asks for weights 0.0.1, bound is Ack"):
        one.draw(item(), newer, one.sha256)
    with pytest.raises(StaleWeightsError, match=r"asks for weights 0\.0\.0"):
        one.draw(item(), VERSION, "0" * 64)
    for asked in (None, (VERSION, "0" * 64), (newer, one.sha256)):
        with pytest.raises(StaleWeightsError, match="a picture of the student asks for weights"):
            one.sample(request("student", weights=asked))
    for bad, message in [
        ({n: w for n, w in weights.items() if n != name}, rf"{name} is missing, here float32 \(4, 32\)"),
        (weights | {name: torch.ones(1, 32)}, rf"{name} is float32 \(1, 32\), here float32 \(4, 32\)"),
        (weights | {name: weights[name].double()}, rf"{name} is float64 \(4, 32\), here float32 \(4, 32\)"),
    ]:
        with pytest.raises(StaleWeightsError, match=message):
            give(one, bad, newer)
        for late in (
            lambda: one.draw(item(), VERSION, one.sha256),
            lambda: one.sample(request("student", weights=(VERSION, one.sha256))),
        ):
            with pytest.raises(StaleWeightsError):
                late()
    ack = give(one, weights, newer)
    assert (ack.version, ack.tensors, ack.sha256) == (newer, len(weights), digest(weights))
    assert ack.checksum == checksum(weights)
    assert one.draw(item(), newer, ack.sha256).weights == newer


def test_bound_weights_are_copies(actor):
    one = actor()
    weights = {name: p.detach().clone() for name, p in one.family.adapter_parameters("student").items()}
    give(one, weights)
    before = draw(one, item()).latents
    for tensor in weights.values():
        tensor.zero_()
    assert torch.equal(draw(one, item()).latents, before)


def test_another_schedule_than_the_models_own_is_refused(tiny, whole):
    from opd_ray.actors import Policy, RolloutActor

    policy = Policy(LORA, "student", 1.5, "flow", 0.0, 7, 1e-3, True)
    with pytest.raises(ModelError, match=r"schedule .* is not the run's \[1.0"):
        RolloutActor(whole, policy, flow_sigmas(4, 2.0))


def test_a_student_that_draws_nan_says_so_itself_and_blames_no_reader(actor, monkeypatch):
    one = actor()
    monkeypatch.setattr(one.family, "velocity", lambda x, *rest: torch.full_like(x, math.nan))
    with pytest.raises(NotFiniteError, match=r"the student of weights .* drew NaN .*lower optimizer\.lr"):
        draw(one, item())


def test_velocities_that_travel_are_those_that_drew_the_path(actor) -> None:
    """Each step is mean + std eps with the kernel's mean at exactly this velocity; in parts they are the same."""
    one = actor(noise_level=0.7, velocities=True)
    work = item(round=3)
    path = draw(one, work)
    assert path.velocities.shape == (len(work.prompts), 4, *one.family.latent_shape)
    ids = [(prompt.id, sample) for prompt, sample in zip(work.prompts, work.samples, strict=True)]
    for j in range(4):
        step = flow(path.state(j), path.velocities[:, j], float(path.sigmas[j]), float(path.sigmas[j + 1]), 0.7)
        eps = noise([fold(7, "step_noise", 3, *names, j) for names in ids], one.family.latent_shape)
        assert torch.equal(path.state(j + 1), step.mean + step.std * eps)
    first = one.draw(work, VERSION, one.sha256, last=2)
    second = one.draw(work, VERSION, one.sha256, before=first)
    joined = join_trajectories([unpack_trajectory(*pack_trajectory(part)) for part in (first, second)])
    assert torch.equal(joined.velocities, path.velocities) and torch.equal(joined.latents, path.latents)
    one.policy = replace(one.policy, velocities=False)
    assert draw(one, work).velocities is None


def test_images_of_a_prompt_may_begin_with_the_same_noise_and_go_their_own_ways(actor) -> None:
    """Two of one prompt, and two of another; then the first prompt once more in its round, as its images 2 and 3."""
    prompts = tuple(prompt(TEXTS[n], "a") for n in (0, 0, 1, 1, 0, 0))
    pairs = WorkItem(0, "a", 0, 0, prompts, (0, 1, 0, 1, 2, 3), (0,))
    one = actor(noise_level=0.7)
    for shared in (1, 2):
        one.policy = replace(one.policy, shared_noise=shared)
        path = draw(one, pairs)
        x = path.state(0)
        for first in (0, 2, 4):
            assert torch.equal(x[first], x[first + 1]) == (shared == 2)
            assert not torch.equal(path.state(1)[first], path.state(1)[first + 1])
        assert not torch.equal(x[1], x[2]) and not torch.equal(x[0], x[4]) and not torch.equal(x[2], x[4])


def test_an_algorithm_chooses_what_is_pictured(actor, whole) -> None:
    """Two pictures of each image here, its second state and its last."""
    one = actor(pictured=lambda path: path.latents[:, [1, 4]])
    path = draw(one, item())
    rows = len(path.latents)
    images = one.decode(path)
    assert images.shape[0] == 2 * rows
    assert torch.equal(images[1::2], whole.decode(path.latents[:, [1, 4]].flatten(0, 1))[1::2])
    assert torch.allclose(images[1::2], whole.decode(path.state(4)), atol=1e-5)
