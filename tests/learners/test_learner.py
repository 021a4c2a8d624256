"""The learner against plain torch, its moving average by hand, and its state to the last bit."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from opd_ray.algorithms.opd import Opd
from opd_ray.config import EmaConfig, OpdConfig, OptimizerConfig
from opd_ray.digest import digest
from opd_ray.errors import OutOfOrderError, RunFolderError
from opd_ray.learners import DdpEngine, LearnerState
from opd_ray.learners.learner import Learner
from tests.algorithms.parts import fill, flat, gradients, item, learner, load, random_experience, stage


@pytest.fixture(scope="module")
def family(tiny):
    return load(tiny)


class Following(Opd):
    """Draws with `old`, which follows the student by half; `frozen` stays."""

    adapters = ("old", "frozen")
    behaviour = "old"

    def follow(self, adapter, round):
        return 0.5 if adapter == "old" else 1.0


ORDER = (("a", 0), ("a", 1), ("b", 0))


def following():
    return Following(OpdConfig())


def train(one: Learner, family, rounds):
    reports = []
    for number in rounds:
        work = item(round=number)
        stage(one, [random_experience(family, work, seed=number)])
        reports.append(one.update(0))
        one.finish_round(number)
    return reports


def copied(state: LearnerState) -> LearnerState:
    """As a checkpoint would keep it: ``state`` gives the live tensors."""
    tensors = {group: {name: t.clone() for name, t in part.items()} for group, part in state.tensors.items()}
    return LearnerState(tensors, dict(state.values))


@pytest.mark.parametrize("clip", [1e9, 2e-4])
def test_a_step_is_adamw_of_plain_torch_on_the_clipped_gradient(tiny, family, clip):
    chosen = OptimizerConfig(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, clip=clip)
    one = learner(tiny, optimizer=chosen)
    fill(one.family, "student", 9)
    plain = {name: torch.nn.Parameter(p.detach().clone()) for name, p in one.student.items()}
    optimizer = torch.optim.AdamW(plain.values(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for number in range(3):
        (report,) = train(one, family, [number])
        unclipped = max(report.grad_norm / clip, 1.0)
        assert float(flat(gradients(one)).norm()) == pytest.approx(report.grad_norm / unclipped, rel=5e-3)
        for name, parameter in plain.items():
            parameter.grad = one.student[name].grad.clone()
        optimizer.step()
        assert torch.equal(flat(plain), flat(one.student))
        assert report.lr == 1e-2
        assert report.grad_norm > 2e-4
    assert one.updates == 3


def test_cosine_decays_over_all_updates_of_the_run(tiny, family):
    class Twice(Opd):
        streams = False
        updates_per_round = 2

    one = learner(tiny, Twice(OpdConfig()), rounds=2, optimizer=OptimizerConfig(lr=0.4, schedule="cosine"))
    rates = []
    for number in range(2):
        stage(one, [random_experience(family, item(round=number))])
        rates += [one.update(update).lr for update in range(2)]
    half = 0.2  # lr / 2
    expected = [half * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert rates == pytest.approx(expected)
    assert rates[0] == pytest.approx(0.4) and rates[2] == pytest.approx(0.2)


def test_the_average_moves_once_per_step_at_its_interval_with_a_warm_up(tiny, family):
    one = learner(tiny, ema=EmaConfig(decay=0.4, every=2))
    expected = flat(one.student).clone()
    for number in range(6):
        # Two work items and four forwards: the reference averages once for each of them.
        work = [item(round=number, index=n, position=n) for n in range(2)]
        stage(one, [random_experience(family, part, seed=number) for part in work])
        one.update(0)
        done = number + 1
        if done % 2 == 0:
            # Warm-up (1 + s) / (10 + s): 3/12 at 2 and 5/14 at 4; from 7/16 at 6 on, the decay itself.
            decay = {2: 3 / 12, 4: 5 / 14, 6: 0.4}[done]
            expected = decay * expected + (1 - decay) * flat(one.student)
        seen = expected if done >= 2 else flat(one.student)  # before the first average it is the untrained start
        torch.testing.assert_close(flat(dict(one.gather(average=True))), seen, rtol=1e-5, atol=1e-7)


def test_without_an_average_the_raw_weights_stand_for_it(tiny, family):
    one = learner(tiny)
    train(one, family, range(1))
    assert torch.equal(flat(dict(one.gather(average=True))), flat(one.student))
    assert one.hashes() == {"student_sha256": digest(one.student), "ema_sha256": None}


def test_hashes_change_with_the_weights(tiny, family):
    one = learner(tiny, ema=EmaConfig(decay=0.5, every=2))
    before = one.hashes()
    assert before["student_sha256"] == before["ema_sha256"]
    train(one, family, range(1))
    after = one.hashes()
    assert after["student_sha256"] == after["ema_sha256"] != before["student_sha256"], "no average was taken yet"
    train(one, family, range(1, 2))
    assert one.hashes()["ema_sha256"] not in {before["ema_sha256"], one.hashes()["student_sha256"]}


def test_going_on_from_a_state_is_going_on_bit_for_bit(tiny, family):
    options = {"ema": EmaConfig(decay=0.5, every=2), "optimizer": OptimizerConfig(lr=1e-2, schedule="cosine")}
    one = learner(tiny, following(), **options)
    train(one, family, range(3))
    saved = copied(one.state())
    assert sorted(saved.tensors) == ["adapter.frozen", "adapter.old", "ema", "optimizer", "student"]
    expected = train(one, family, range(3, 5))
    fresh = learner(tiny, following(), seed=99, **options)  # other initial weights
    fresh.load_state(saved)
    assert train(fresh, family, range(3, 5)) == expected
    ours, theirs = one.state(), fresh.state()
    assert ours.values == theirs.values == {"updates": 5, "student_updates": 5, "algorithm": {}, "scaler": {}}
    assert all(digest(ours.tensors[group]) == digest(theirs.tensors[group]) for group in ours.tensors)


def test_a_loaded_state_is_a_copy(tiny, family):
    one = learner(tiny, ema=EmaConfig(every=1))
    train(one, family, range(1))
    saved = copied(one.state())
    before = {group: digest(part) for group, part in saved.tensors.items()}
    fresh = learner(tiny, ema=EmaConfig(every=1))
    fresh.load_state(saved)
    train(fresh, family, range(1, 3))
    assert {group: digest(part) for group, part in saved.tensors.items()} == before


A = "transformer_blocks.0.attn.add_k_proj.lora_A.weight"


def broken(state: LearnerState, change) -> LearnerState:
    tensors = {group: dict(part) for group, part in copied(state).tensors.items()}
    change(tensors)
    return LearnerState(tensors, state.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda groups: groups["student"].pop(A),
            rf"student is not this run's: {A} is missing there and \(4, 32\) here",
        ),
        (lambda groups: groups["student"].update({A: torch.ones(1, 32)}), rf"{A} is \(1, 32\) there and \(4, 32\) h"),
        (lambda groups: groups["ema"].update(new=torch.ones(1)), r"ema is not this run's: new is \(1,\) there and mis"),
        (lambda groups: groups.pop("ema"), r"ema is not this run's"),
        (lambda groups: groups.pop("adapter.old"), r"adapter.old is not this run's"),
        (lambda groups: groups.update(extra={"x": torch.ones(1)}), r"extra is not this run's: x is \(1,\) there"),
        (lambda groups: groups["optimizer"].update({"y:step": torch.ones(())}), r"optimizer has y:step, which belongs"),
        (lambda groups: groups["optimizer"].update({f"{A}:exp_avg": torch.ones(2)}), r"optimizer has .*exp_avg"),
    ],
)
def test_a_state_of_another_learner_is_refused_and_nothing_of_it_taken(tiny, family, change, message):
    one = learner(tiny, following(), ema=EmaConfig())
    train(one, family, range(1))
    other = broken(one.state(), change)
    fresh = learner(tiny, following(), ema=EmaConfig(), seed=99)
    before = fresh.hashes()
    with pytest.raises(RunFolderError, match=message):
        fresh.load_state(other)
    assert fresh.hashes() == before and fresh.updates == 0


def test_extra_adapters_start_as_copies_and_follow_after_each_round(tiny, family):
    one = learner(tiny, following())
    start = flat(one.student).clone()
    old, frozen = (one.family.adapter_parameters(name) for name in ("old", "frozen"))
    assert torch.equal(flat(old), start) and torch.equal(flat(frozen), start)
    assert digest(dict(one.gather())) == digest(old)  # what is published is the behaviour policy
    train(one, family, range(1))
    first = flat(one.student).clone()
    torch.testing.assert_close(flat(old), 0.5 * start + 0.5 * first)
    train(one, family, range(1, 2))
    torch.testing.assert_close(flat(old), 0.25 * start + 0.25 * first + 0.5 * flat(one.student))
    assert torch.equal(flat(frozen), start)
    assert digest(dict(one.gather())) == digest(old) != digest(dict(one.gather(average=True)))


def test_an_adapter_that_keeps_nothing_is_the_student_to_the_last_bit(tiny, family):
    class Copying(Opd):
        adapters = ("old",)

    one = learner(tiny, Copying(OpdConfig()))
    train(one, family, range(1))
    assert torch.equal(flat(one.family.adapter_parameters("old")), flat(one.student))


def test_a_loss_gets_the_velocities_of_the_policies_it_names(tiny, family):
    seen = []

    class Comparing(Following):
        velocities = ("frozen", "reference")

        def loss(self, forward, velocity):
            seen.append(velocity)
            return super().loss(forward, velocity)

    one = learner(tiny, Comparing(OpdConfig()))
    fill(one.family, "student", 9)
    fill(one.family, "frozen", 8)
    part = random_experience(family, item(steps=(1,)))
    path = part.trajectory
    expected = {}
    for name, adapter in (("student", "student"), ("frozen", "frozen"), ("reference", None)):
        with torch.no_grad(), one.family.adapter(adapter):
            arguments = (path.latents[:, 1], float(path.sigmas[1]), path.cond, path.uncond, 1.5)
            expected[name] = one.family.velocity(*arguments)
    stage(one, [part])
    one.update(0)
    assert seen[0].keys() == expected.keys()
    assert all(torch.equal(seen[0][name], velocity) for name, velocity in expected.items())
    assert [name for name, velocity in seen[0].items() if velocity.requires_grad] == ["student"]
    assert not torch.equal(expected["student"], expected["frozen"])
    assert not torch.equal(expected["student"], expected["reference"])


def test_the_probe_is_that_of_the_weights_that_are_published(tiny, family):
    one = learner(tiny, following(), ema=EmaConfig(decay=0.9, every=1))
    fill(one.family, "student", 9)
    train(one, family, range(2))
    raw = digest(one.student)
    for average in (False, True):
        probe = one.probe(average=average)
        twin = learner(tiny)
        with torch.no_grad():
            for name, parameter in twin.student.items():
                parameter.copy_(dict(one.gather(average=average))[name])
        assert torch.equal(probe, twin.probe())
    assert digest(one.student) == raw and one.family.active == "student"


class AtOnce(Opd):
    """The same algorithm, whose round is trained on when all of it is there."""

    streams = False


class Engine(DdpEngine):
    """One rank, perhaps of several that are not there; writes down which backward would reduce."""

    def __init__(self):
        super().__init__(0, 1)
        self.reduced = []

    def accumulate(self, *, last):
        self.reduced.append(last)
        return nullcontext()


def three(family, **changes):
    work = [item(task=task, index=index, position=n, **changes) for n, (task, index) in enumerate(ORDER)]
    return [random_experience(family, part, seed=part.position) for part in work]


def test_gradients_that_accumulate_as_items_arrive_are_those_of_the_whole_round(tiny, family):
    streaming, waiting = (learner(tiny, kind(OpdConfig(task_weights={"b": 3.0}))) for kind in (Opd, AtOnce))
    for number in range(3):
        reports = []
        for one in (streaming, waiting):
            stage(one, three(family, round=number))
            arrived = one.student.keys() <= gradients(one).keys()
            assert arrived == (one is streaming), "two of three items are in the gradient before the update"
            reports.append(one.update(0))
            one.finish_round(number)
        assert reports[0] == reports[1]
        assert digest(streaming.student) == digest(waiting.student)
        assert torch.equal(flat(gradients(streaming)), flat(gradients(waiting)))


def test_nothing_is_reduced_and_no_weight_changes_before_a_rank_has_all_of_its_items(tiny, family):
    engine = Engine()
    one = learner(tiny, engine=engine)
    for rank, own in ((0, [0, 2]), (1, [1])):
        engine.rank, engine.ranks, engine.reduced = rank, 2, []
        experience, before = three(family), digest(one.student)
        one.begin([part.item for part in experience])
        for number in own:
            one.take(experience[number])
        assert engine.reduced == [False, False] * (len(own) - 1), "its last item waits for the update"
        assert digest(one.student) == before and one.updates == rank
        one.update(0)
        assert engine.reduced == [False] * (2 * len(own) - 1) + [True]


def test_gradients_come_in_the_order_of_tasks_items_and_steps(tiny, family, monkeypatch):
    one, seen = learner(tiny), []
    loss = Opd.loss

    def counting(self, forward, velocity):
        seen.append((forward.cond["pooled_projections"][0, 0].item(), forward.step))
        return loss(self, forward, velocity)

    monkeypatch.setattr(Opd, "loss", counting)
    experience = three(family)
    stage(one, experience)
    one.update(0)
    names = [part.trajectory.cond["pooled_projections"][0, 0].item() for part in experience]
    assert seen == [(name, step) for name in names for step in experience[0].item.steps]


@pytest.mark.parametrize("kind", [Opd, AtOnce])
def test_an_item_out_of_order_is_refused_and_changes_nothing(tiny, family, kind):
    one, other, experience = learner(tiny, kind(OpdConfig())), learner(tiny, kind(OpdConfig())), three(family)
    one.begin([part.item for part in experience])
    for wrong in (experience[1], experience[2]):
        with pytest.raises(OutOfOrderError, match=r"rank 0 got round 0 .* and waits for \['round 0 a\[0\]'\]"):
            one.take(wrong)
    one.take(experience[0])
    with pytest.raises(OutOfOrderError):
        one.take(experience[0])
    with pytest.raises(ValueError, match="rank 0 has 1 of its 3 work items"):
        one.update(0)
    one.take(experience[1])
    one.take(experience[2])
    with pytest.raises(OutOfOrderError, match=r"waits for \[\]"):
        one.take(experience[2])
    stage(other, experience)
    assert one.update(0) == other.update(0)


def test_a_round_that_begins_again_starts_over(tiny, family):
    one, other, experience = learner(tiny), learner(tiny), three(family)
    one.begin([part.item for part in experience])
    one.take(experience[0])
    one.take(experience[1])
    stage(one, experience)
    stage(other, experience)
    assert one.update(0) == other.update(0)
    assert digest(one.student) == digest(other.student)


def test_an_algorithm_sees_the_scores_before_its_first_update(tiny, family):
    class Counting(AtOnce):
        def __init__(self, config):
            super().__init__(config)
            self.seen = []

        def observe(self, scores):
            self.seen.append([(str(work), sorted(by_name)) for work, by_name in scores])

        def select(self, items, update):
            self.seen.append(update)
            return items

    algorithm = Counting(OpdConfig())
    one = learner(tiny, algorithm)
    stage(one, [replace(random_experience(family, item()), scores={"look": torch.ones(2)})])
    for update in range(2):
        one.update(update)
    assert algorithm.seen == [[("round 0 a[0]", ["look"])], 0, 1]


def test_a_model_is_where_its_engine_computes_wherever_it_was_loaded(tiny):
    engine = Engine()
    engine.device = "meta"
    assert learner(tiny, engine=engine).family.device == "meta"


def test_a_rank_without_work_is_an_error_and_the_engine_says_what_it_got(tiny, family):
    one = learner(tiny)
    one.begin([])
    with pytest.raises(ValueError, match="0 work items leave a rank of 1 without work"):
        one.update(0)
    with pytest.raises(RuntimeError, match=r"asked accelerate for ddp rank 1 of 2, got .* rank 0 of 1"):
        DdpEngine(1, 2)
