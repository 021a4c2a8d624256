"""What a worker process holds, called in this process: what goes in and out, and what is refused."""

import itertools
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

from opd_ray.actors import Policy, RewardActor, RolloutActor, TeacherActor
from opd_ray.actors.recorded import RecordedActor
from opd_ray.config import LoraConfig, ModelConfig, TeacherConfig
from opd_ray.digest import checksum, digest
from opd_ray.errors import BadInputError, StaleWeightsError
from opd_ray.models import load_family
from opd_ray.rewards import Scorer
from opd_ray.roles import make_learner
from opd_ray.runtime.hosts import LearnerHost, RecordedHost, RolloutHost, Share, TeacherHost
from opd_ray.runtime.rewards import RewardHost
from opd_ray.storage.packing import (
    manifest_of,
    pack,
    pack_answer,
    pack_trajectory,
    pack_whole,
    unpack,
    unpack_answer,
    unpack_trajectory,
    unpack_whole,
)
from opd_ray.types import Prompt, Scored, TeacherAnswer, WeightVersion, WorkItem
from tests.algorithms.parts import on
from tests.models.tiny_sd3 import make_tiny_sd3

VERSION = WeightVersion(0, 0, 0)
ROWS = (Prompt("1", "red cat", "a"), Prompt("2", "two dogs", "a"))
ITEM = WorkItem(0, "a", 0, 0, ROWS, (0, 0), (0, 2))


def rollout(path, **changes):
    family = load_family(ModelConfig(path=str(path)), text=True, image=True)
    chosen = {
        "lora": LoraConfig(rank=4, alpha=8),
        "adapter": "student",
        "guidance": 2.0,
        "kernel": "flow",
        "noise_level": 0.0,
        "seed": 0,
        "probe_tolerance": 1e-3,
        "negatives": True,
    }
    return RolloutHost(lambda: RolloutActor(family, Policy(**chosen | changes), family.sigmas(4)))


@pytest.fixture(scope="module")
def learner(make_config):
    """A learner whose student is not what it started as."""
    host = LearnerHost(partial(make_learner, make_config(), 0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in host.learner.student.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return host


@pytest.fixture
def published(learner):
    """Weights as they arrive at a worker: the bytes are read-only."""
    flat, done = learner.publish(VERSION, False, 0)
    flat.flags.writeable = False
    return done.value, flat


@pytest.fixture
def painter(tiny):
    return rollout(tiny)


@pytest.fixture
def drawn(painter, published):
    painter.bind(*published)
    weights, _ = published
    return painter.draw(ITEM, VERSION, weights.sha256, 4, True)


def test_a_learners_weights_arrive_bit_by_bit(learner, painter, published) -> None:
    weights, flat = published
    ack = painter.bind(weights, flat).value
    assert (ack.version, ack.sha256, ack.tensors) == (VERSION, weights.sha256, len(learner.learner.student))
    assert ack.checksum == checksum(learner.learner.student) == weights.checksum
    bound = painter.actor.family.adapter_parameters("student")
    assert digest(bound) == digest(learner.learner.student) == weights.sha256
    assert torch.equal(painter.actor.probe(), learner.learner.probe())


def test_bound_weights_share_nothing_with_what_was_stored(painter, published) -> None:
    weights, flat = published
    before = flat.copy()
    painter.bind(weights, flat)
    with torch.no_grad():
        for parameter in painter.actor.family.adapter_parameters("student").values():
            parameter.add_(1)
    assert (flat == before).all()


@pytest.fixture
def in_buckets(make_config):
    """The same weights' record and arrays, published in buckets of at most 2,000 bytes."""
    host = LearnerHost(partial(make_learner, make_config(), 0), bucket=2000)
    with torch.no_grad():
        for parameter in host.learner.student.values():
            parameter.fill_(0.5)
    answers = [host.publish(VERSION, False, number) for number in range(host.ready().value.buckets)]
    assert [done.value for _, done in answers[:-1]] == [None] * (len(answers) - 1)
    return host, answers[-1][1].value, [flat for flat, _ in answers]


def test_weights_in_buckets_arrive_as_those_in_one(in_buckets, painter) -> None:
    host, weights, flats = in_buckets
    assert len(flats) > 10
    largest = max(parameter.nbytes for parameter in host.learner.student.values())
    assert max(manifest_of(flat).nbytes for flat in flats[:-1]) <= max(largest, 2000)
    ack = painter.bind(weights, *flats).value
    assert ack.sha256 == weights.sha256 == digest(host.learner.student)
    assert ack.checksum == weights.checksum == checksum(host.learner.student)


@pytest.mark.parametrize("change", ["missing", "twice", "another"])
def test_buckets_that_are_not_those_of_the_record_are_refused(in_buckets, painter, change) -> None:
    host, weights, flats = in_buckets
    with torch.no_grad():
        host.learner.student[min(host.learner.student)].add_(1)
    another, _ = host.publish(VERSION, False, 0)
    first = {"missing": [], "twice": [flats[0], flats[0]], "another": [another]}[change]
    with pytest.raises(StaleWeightsError):
        painter.bind(weights, *first, *flats[1:])
    with pytest.raises(StaleWeightsError):
        painter.draw(ITEM, VERSION, weights.sha256, 4, False)


def repacked(weights, flat, change):
    """The same weights with something changed on the way, under the same identity."""
    tensors = unpack_whole(flat)
    change(tensors)
    return weights, pack_whole(tensors)


def one_bit(tensors) -> None:
    next(iter(tensors.values())).view(torch.int32).flatten()[0] ^= 1


def missing(tensors) -> None:
    tensors.pop(next(iter(tensors)))


def swapped(tensors) -> None:
    """Two of one shape."""
    for one, other in itertools.combinations(sorted(tensors.keys() - {"probe"}), 2):
        if tensors[one].shape == tensors[other].shape:
            tensors[one], tensors[other] = tensors[other], tensors[one]
            return


def another_sign(tensors) -> None:
    tensors[max(tensors)].neg_()


def another_probe(tensors) -> None:
    tensors["probe"].neg_()


@pytest.mark.parametrize("change", [one_bit, missing, swapped, another_sign, another_probe])
def test_weights_that_changed_on_the_way_are_refused(painter, published, change) -> None:
    weights, flat = repacked(*published, change)
    with pytest.raises(StaleWeightsError):
        painter.bind(weights, flat)
    with pytest.raises(StaleWeightsError):
        painter.draw(ITEM, VERSION, weights.sha256, 4, False)


def test_weights_over_another_base_are_refused_by_the_probe(published, tmp_path) -> None:
    other = rollout(make_tiny_sd3(tmp_path / "other", seed=1))
    with pytest.raises(StaleWeightsError, match="base model or adapter differ"):
        other.bind(*published)


def test_another_alpha_is_refused_by_the_probe(tiny, published) -> None:
    with pytest.raises(StaleWeightsError, match="the probe of weights"):
        rollout(tiny, lora=LoraConfig(rank=4, alpha=16)).bind(*published)


def test_a_refused_probe_is_tried_again_at_the_next_bind(published, tmp_path) -> None:
    other = rollout(make_tiny_sd3(tmp_path / "other", seed=1))
    for _ in range(2):
        with pytest.raises(StaleWeightsError):
            other.bind(*published)


@pytest.mark.parametrize("bound", [False, True])
def test_a_draw_for_weights_that_were_not_proven_is_refused(painter, published, bound) -> None:
    weights, _ = published
    if bound:
        painter.bind(*published)
    version = WeightVersion(0, 0, 1) if bound else VERSION
    with pytest.raises(StaleWeightsError, match="asks for weights"):
        painter.draw(ITEM, version, weights.sha256, 4, False)


def test_a_fresh_worker_proves_the_average_as_well_as_the_raw_weights(tiny, make_config) -> None:
    host = LearnerHost(partial(make_learner, make_config(), 0))
    with torch.no_grad():
        for parameter in host.learner.student.values():
            parameter.add_(0.1)
    host.learner.student_updates = 8  # as many as the average waits for
    flat, done = host.publish(VERSION, True, 0)
    assert done.value.sha256 != digest(host.learner.student)
    assert rollout(tiny).bind(done.value, flat).value.sha256 == done.value.sha256


def test_a_drawing_comes_back_as_it_was_made(painter, drawn) -> None:
    flat, pictures, done = drawn
    weights = painter.actor.bound
    direct = painter.actor.draw(ITEM, weights.version, weights.sha256)
    back = unpack_trajectory(flat, done.value.trajectory)
    assert back.item == ITEM and back.weights == VERSION
    assert torch.equal(back.latents, direct.latents)
    assert all(torch.equal(back.cond[name], direct.cond[name]) for name in direct.cond)
    assert all(torch.equal(back.uncond[name], direct.uncond[name]) for name in direct.uncond)
    assert torch.equal(unpack(pictures, done.value.images)["images"], painter.actor.decode(direct))
    assert done.forwards == 4 * 2 * 2, "steps, rows, guidance"


def test_pictures_are_left_out_unless_asked_for(painter, published) -> None:
    painter.bind(*published)
    _, pictures, done = painter.draw(ITEM, VERSION, published[0].sha256, 4, False)
    assert pictures.nbytes == 0 and done.value.images is None


def test_a_drawing_that_nobody_looks_at_ends_at_the_last_trained_step(painter, drawn) -> None:
    weights = painter.actor.bound
    flat, _, done = painter.draw(ITEM, VERSION, weights.sha256, max(ITEM.steps), False)
    part, whole = unpack_trajectory(flat, done.value.trajectory), unpack_trajectory(drawn[0], drawn[2].value.trajectory)
    last = max(ITEM.steps)
    assert torch.equal(part.latents, whole.latents[:, : last + 1]) and whole.latents.shape[1] == 5
    assert done.forwards == last * 2 * 2, "steps, rows, guidance"


def test_a_mark_comes_back_as_it_was_made_and_changes_no_stored_byte(tiny, tiny_teachers, drawn) -> None:
    flat, _, done = drawn
    flat.flags.writeable = False
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    config = TeacherConfig(lora=str(tiny_teachers["a"]), guidance=2.0)
    host = TeacherHost(lambda: TeacherActor(on(family), {"a": config}))
    before = flat.copy()
    answer, marked = host.score((done.value.trajectory,), "a", flat)
    back = unpack_answer(answer, marked.value)
    direct = host.actor.score(unpack_trajectory(flat, done.value.trajectory), "a")
    assert (back.teacher, back.steps) == ("a", (0, 2))
    assert torch.equal(back.velocity, direct.velocity)
    assert marked.forwards == 2 * 2 * 2, "trained steps, rows, guidance"
    assert (flat == before).all()
    assert host.ready().value["a"].guidance == 2.0


def test_a_share_takes_its_arrays_in_order(tiny, tiny_teachers, drawn) -> None:
    flat, _, done = drawn
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    host = TeacherHost(lambda: TeacherActor(on(family), {"a": TeacherConfig(lora=str(tiny_teachers["a"]))}))
    answer, marked = host.score((done.value.trajectory,), "a", flat)
    recorded, manifest = pack({"x": torch.ones(3)})
    scored = Scored({"ocr": [0.5, float("nan")]}, {"ocr": {1: "RuntimeError: no"}})
    share = Share(ITEM, (done.value.trajectory,), (marked.value,), manifest, scored)
    flats = [flat, answer, recorded, "of the next item"]
    experience = share.unpack(flats)
    assert flats == ["of the next item"]
    assert torch.equal(experience.answer.velocity, unpack_answer(answer, marked.value).velocity)
    assert torch.equal(experience.recorded["x"], torch.ones(3))
    assert experience.scores["ocr"].tolist() == [0.5, float("inf")]


def brightness() -> RewardActor:
    return RewardActor({"mean": Scorer("mean", lambda images, prompts: images.mean((1, 2, 3)), finite=True)})


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, text, "any") for text in texts]


def test_scores_are_records(drawn) -> None:
    _, pictures, done = drawn
    host = RewardHost(brightness)
    scored = host.score(prompts_of("x", "y"), done.value.images, pictures)
    expected = unpack(pictures, done.value.images)["images"].mean((1, 2, 3)).tolist()
    assert scored.value == Scored({"mean": expected}, {}) and host.ready().value == {"mean": "finite"}


def test_a_recording_comes_back_as_it_was_saved(tmp_path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "a").mkdir()
    save_file({"x": torch.arange(5)}, tmp_path / "a" / "one.safetensors")
    flat, done = RecordedHost(lambda: RecordedActor(str(tmp_path))).read("a", "one.safetensors")
    assert torch.equal(unpack(flat, done.value)["x"], torch.arange(5))


def test_work_that_was_taken_is_a_copy(learner, drawn, tiny, tiny_teachers) -> None:
    flat, _, done = drawn
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    host = TeacherHost(lambda: TeacherActor(on(family), {"a": TeacherConfig(lora=str(tiny_teachers["a"]))}))
    answer, marked = host.score((done.value.trajectory,), "a", flat)
    flat.flags.writeable = answer.flags.writeable = False
    before = flat.copy(), answer.copy()
    learner.begin([ITEM])
    learner.take(Share(ITEM, (done.value.trajectory,), (marked.value,)), flat, answer)
    experience = learner.learner._experience[0]
    experience.trajectory.latents.add_(1)
    experience.answer.velocity.add_(1)
    assert (flat == before[0]).all() and (answer == before[1]).all()
    learner.finish_round(0)


def test_trajectories_pack_without_loss(painter, published) -> None:
    painter.bind(*published)
    trajectory = painter.actor.draw(ITEM, VERSION, published[0].sha256)
    again, _ = pack_trajectory(trajectory)
    assert (again == painter.draw(ITEM, VERSION, published[0].sha256, 4, False)[0]).all()


def in_parts(painters, host, sha256, ends, images=False):
    """A drawing in parts, each by the next of the painters, and its marks; as a run has them drawn."""
    flats, records, marks, pictures = [], [], [], None
    for number, end in enumerate(ends):
        last = images and end == ends[-1]
        before = tuple(dict.fromkeys((0, number - 1))) if number else ()
        flat, pictures, done = painters[number % len(painters)].draw(
            *(ITEM, VERSION, sha256, end, last),
            *((tuple(records[n] for n in before), *(flats[n] for n in before)) if number else ()),
        )
        flat.flags.writeable = False
        flats.append(flat)
        records.append(done.value.trajectory)
        if any(records[-1].first <= step <= end for step in ITEM.steps):
            own = tuple(dict.fromkeys((0, number)))
            marks.append(host.score(tuple(records[n] for n in own), "a", *(flats[n] for n in own)))
    share = Share(ITEM, tuple(records), tuple(mark.value for _, mark in marks))
    return share, [*flats, *(flat for flat, _ in marks)], pictures


@pytest.mark.parametrize("ends", [(2, 4), (1, 2, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("noise_level", [0.0, 0.6])
def test_a_drawing_in_parts_by_several_workers_is_the_drawing_by_one(
    tiny, tiny_teachers, published, ends, noise_level
) -> None:
    painters = [rollout(tiny, noise_level=noise_level) for _ in range(2)]
    for painter in painters:
        painter.bind(*published)
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    host = TeacherHost(lambda: TeacherActor(on(family), {"a": TeacherConfig(lora=str(tiny_teachers["a"]), guidance=2)}))
    rows = [sum(painter.actor.family.forwards for painter in painters), host.actor.forwards]
    share, flats, pictures = in_parts(painters, host, published[0].sha256, ends, images=True)
    rows += [sum(painter.actor.family.forwards for painter in painters), host.actor.forwards]
    whole, whole_flats, whole_pictures = in_parts(painters, host, published[0].sha256, (4,), images=True)
    assert len(share.trajectory) == len(ends) and len(share.answer) == 1 + (ends[0] < 2)
    assert not any(
        entry.name.startswith(("cond", "uncond")) for part in share.trajectory[1:] for entry in part.manifest.entries
    )
    one, other = share.unpack(flats), whole.unpack(whole_flats)
    for name in ("sigmas", "latents"):
        assert torch.equal(getattr(one.trajectory, name), getattr(other.trajectory, name))
    for name in ("cond", "uncond"):
        mine, theirs = getattr(one.trajectory, name), getattr(other.trajectory, name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert one.answer.steps == other.answer.steps == ITEM.steps
    assert torch.equal(one.answer.velocity, other.answer.velocity)
    assert (pictures == whole_pictures).all()
    assert [rows[2] - rows[0], rows[3] - rows[1]] == [4 * 2 * 2, 2 * 2 * 2], "steps, rows, guidance"


def test_a_part_needs_the_weights_that_drew_the_part_before(learner, painter, published) -> None:
    painter.bind(*published)
    flat, _, done = painter.draw(ITEM, VERSION, published[0].sha256, 2, False)
    newer = WeightVersion(0, 0, 1)
    flat_of_newer, published_again = learner.publish(newer, False, 0)
    with pytest.raises(StaleWeightsError, match=r"asks for weights 0\.0\.1, bound is"):
        painter.draw(ITEM, newer, published[0].sha256, 4, False, (done.value.trajectory,), flat)
    painter.bind(published_again.value, flat_of_newer)
    with pytest.raises(StaleWeightsError, match=r"asks for weights 0\.0\.1, its part before was drawn with 0\.0\.0"):
        painter.draw(ITEM, newer, published[0].sha256, 4, False, (done.value.trajectory,), flat)


def spoiled(flat, manifest, name, value=float("nan")):
    """An array with a number that is none."""
    tensors = unpack(flat, manifest)
    tensors[name].view(-1)[-1] = value
    return pack(tensors)[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_by_every_reader(
    learner, painter, published, tiny, tiny_teachers, value
) -> None:
    painter.bind(*published)
    weights, _ = published
    flat, pictures, done = painter.draw(ITEM, VERSION, weights.sha256, 4, True)
    path = done.value.trajectory
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    teacher = TeacherHost(lambda: TeacherActor(on(family), {"a": TeacherConfig(lora=str(tiny_teachers["a"]))}))
    answer, marked = teacher.score((path,), "a", flat)
    reward = RewardHost(brightness)
    bad, good = spoiled(flat, path.manifest, "latents", value), Share(ITEM, (path,), (marked.value,))
    learner.begin([ITEM])
    readers = [
        (lambda: teacher.score((path,), "a", bad), "trajectory", "latents of round 0 a[0], to be marked by a"),
        (lambda: learner.take(good, bad, answer), "trajectory", "latents of round 0 a[0], to be trained on"),
        (
            lambda: learner.take(good, flat, spoiled(answer, marked.value.manifest, "velocity", value)),
            "answer",
            "in what a answered to round 0 a[0]",
        ),
        (
            lambda: reward.score(
                prompts_of("x", "y"), done.value.images, spoiled(pictures, done.value.images, "images", value)
            ),
            "images",
            "in the picture of 'y'",
        ),
        (
            lambda: painter.draw(ITEM, VERSION, weights.sha256, 4, False, (replace(path),), bad),
            "trajectory",
            "latents of round 0 a[0], to be drawn on",
        ),
    ]
    for read, what, text in readers:
        with pytest.raises(BadInputError) as caught:
            read()
        assert caught.value.what == what and text in str(caught.value)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.what, str(again)) == (what, str(caught.value))
    learner.take(good, flat, answer)
    learner.finish_round(0)


@pytest.mark.parametrize(
    ("steps", "shape"), [((0, 2), (2, 2, 16, 4, 8)), ((0, 2), (1, 2, 16, 8, 8)), ((0, 1), (2, 2, 16, 8, 8))]
)
def test_an_answer_that_does_not_fit_its_trajectory_is_refused(learner, drawn, steps, shape) -> None:
    flat, _, done = drawn
    answer, record = pack_answer(TeacherAnswer("a", steps, torch.zeros(shape)))
    learner.begin([ITEM])
    with pytest.raises(BadInputError, match=r"answer: a answered round 0 a\[0\] (with|at steps) .*, expected "):
        learner.take(Share(ITEM, (done.value.trajectory,), (record,)), flat, answer)
    learner.finish_round(0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", ["trajectory", "answer"])
def test_of_what_came_in_parts_the_bad_one_is_named(learner, painter, published, tiny, tiny_teachers, which, what):
    painter.bind(*published)
    sha256 = published[0].sha256
    first, _, begun = painter.draw(ITEM, VERSION, sha256, 1, False)
    second, _, ended = painter.draw(ITEM, VERSION, sha256, 4, False, (begun.value.trajectory,), first)
    records, flats = (begun.value.trajectory, ended.value.trajectory), [first, second]
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    teacher = TeacherHost(lambda: TeacherActor(on(family), {"a": TeacherConfig(lora=str(tiny_teachers["a"]))}))
    scored = [teacher.score(records[:1], "a", first), teacher.score(records, "a", first, second)]
    marks, answers = tuple(done.value for _, done in scored), [answer for answer, _ in scored]
    spoil, record, name = {
        "trajectory": (flats, records[which], "latents"),
        "answer": (answers, marks[which], "velocity"),
    }[what]
    spoil[which] = spoiled(spoil[which], record.manifest, name)
    learner.begin([ITEM])
    with pytest.raises(BadInputError) as caught:
        learner.take(Share(ITEM, records, marks), *flats, *answers)
    assert (caught.value.what, caught.value.part) == (what, which)
    learner.finish_round(0)


def test_a_drawing_of_another_shape_is_refused_by_every_reader(
    learner, painter, published, tiny, tiny_teachers
) -> None:
    """The driver knows how many rows and states there are; channels and size are known to who has a model."""
    painter.bind(*published)
    _, pictures, done = painter.draw(ITEM, VERSION, published[0].sha256, 4, True)
    flat, record = pack_trajectory(painter.actor.draw(ITEM, VERSION, published[0].sha256))
    tensors = unpack(flat, record.manifest)
    narrow, manifest = pack(tensors | {"latents": tensors["latents"][..., 1:].contiguous()})
    bad = replace(record, manifest=manifest)
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    teacher = TeacherHost(lambda: TeacherActor(on(family), {"a": TeacherConfig(lora=str(tiny_teachers["a"]))}))
    reward = RewardHost(brightness)
    answer, marked = teacher.score((record,), "a", flat)
    learner.begin([ITEM])
    for read, what in (
        (lambda: teacher.score((bad,), "a", narrow), "trajectory"),
        (lambda: learner.take(Share(ITEM, (bad,), (marked.value,)), narrow, answer), "trajectory"),
        (lambda: painter.draw(ITEM, VERSION, published[0].sha256, 4, False, (bad,), narrow), "trajectory"),
        (lambda: reward.score(prompts_of("x", "y", "z"), done.value.images, pictures), "images"),
    ):
        with pytest.raises(BadInputError, match=r"expected|for 3 prompts") as caught:
            read()
        assert caught.value.what == what
    learner.finish_round(0)
