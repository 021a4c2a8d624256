"""The learner group over a backend in memory: what a rank gets and when, and what happens where an input is gone."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from opd_ray.errors import BadInputError, LearnerLostError, OutOfOrderError, Stopped
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.group import MAX_TRIES, UNANSWERED, Collected, LearnerGroup
from opd_ray.runtime.handle import Done, RankFacts, Weights, WorkerSpec
from opd_ray.runtime.hosts import Share
from opd_ray.runtime.jobs import Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.types import Prompt, Scored, WorkItem
from tests.runtime.fake import Critic, FakeBackend, Painter, weights


@dataclass
class Rank:
    """Keeps what it is given, in order or not at all."""

    number: int
    ranks: int
    log: list = field(default_factory=list)
    bad: list = field(default_factory=list)
    """What is said of the next items, instead of taking them."""

    def ready(self):
        return Done(RankFacts("fp32"), 0.0, 0)

    def begin(self, items):
        self.awaited = [item for item in items if item.position % self.ranks == self.number]
        self.log.append("begin")
        return Done(None, 0.0, 0)

    def take(self, share, *arrays):
        if share.item != self.awaited[0]:
            raise OutOfOrderError(f"got {share.item}")
        if self.bad:
            raise BadInputError(self.bad.pop(), "is not finite")
        self.awaited.pop(0)
        self.log.append((share.item.position, *arrays))
        return Done(None, 1.0, 5)

    def observe(self, scores):
        self.log.append([(item.position, dict(of_item)) for item, of_item in scores])
        return Done(None, 0.0, 0)

    def update(self, update):
        assert not self.awaited, "every rank has all of its items"
        self.log.append("update")
        return Done(f"rank {self.number}", 2.0, 0)

    def publish(self, version, average, bucket):
        self.log.append(("publish", average))
        return f"flat {self.number}", Done(Weights(version, f"sha of {self.number}"), 0.0, 0)

    def save(self, run_dir, round, driver, attempt, keep):
        self.log.append(("save", round))
        return Done(f"path of {self.number}", 0.0, 0)

    def serialise(self, round, driver):
        self.log.append(("serialise", round))
        return f"state of {self.number}", Done(None, 0.0, 0)

    def take_back(self, flat):
        self.log.append(("take back", flat))
        return Done({"of": flat}, 0.0, 0)

    def export(self, folder):
        self.log.append(("export", folder))
        return Done(None, 0.0, 0)


class Clerk:
    """Has the run folder."""

    def ready(self):
        return Done(None, 0.0, 0)

    def commit(self, run_dir, round, attempt, keep, flat):
        return Done(f"path of {flat}", 0.0, 0)

    def newest(self, run_dir):
        return "checkpoint", Done((3, ["a note"]), 0.0, 0)


class Desk:
    """Items that are drawn and marked, and ranks that take them."""

    def __init__(self, ranks=1, items=4, *, sharded=False, ship=False) -> None:
        self.backend = FakeBackend()
        self.dispatcher = Dispatcher(self.backend, call_timeout_s=60, clock=self.backend.clock)
        self.notes = []
        self.dispatcher.note = self.notes.append
        self.painters, self.critics = self.pool("rollout", Painter), self.pool("teacher", Critic)
        self.hosts = [Rank(number, ranks) for number in range(ranks)]
        specs = [WorkerSpec("learner", lambda host=host: host, 1, {}) for host in self.hosts]
        clerk = self.pool("clerk", Clerk) if ship else None
        self.group = LearnerGroup(self.dispatcher, specs, attempt=0, start_timeout_s=30, sharded=sharded, clerk=clerk)
        self.dispatcher.wait_ready()
        self.group.wait_ready()
        by = weights(self.backend, 0)
        self.items = [WorkItem(0, "a", n, n, (Prompt("p", "p", "a"),), (0,), (0,)) for n in range(items)]
        self.collected = [self.collect(item, by) for item in self.items]

    def pool(self, role, factory):
        spec = WorkerSpec(role, factory, 1, {})
        made = Pool(self.backend, spec, 1, clock=self.backend.clock, start_timeout_s=30, call_timeout_s=60)
        self.dispatcher.pools.append(made)
        return made

    def collect(self, item, by):
        n = item.position
        draw = Job(self.painters, "draw", (n, by.version, by.sha256), 1, f"drawing {n}", weights=by)
        mark = Job(self.critics, "score", lambda: (n, Output(draw, 0)), 1, f"marking {n}", after=(draw,))
        jobs = (self.dispatcher.submit(draw), self.dispatcher.submit(mark))
        made = {"trajectory": (draw,), "answer": (mark,)}
        return Collected(item, lambda: Share(item, scores=Scored({"look": [float(n)]}, {})), made, jobs)

    def arrive(self, one):
        self.dispatcher.wait(one.jobs)
        self.group.take(one)

    def round(self):
        self.group.begin(self.items)
        for one in self.collected:
            self.arrive(one)
        return self.group.update(0)

    def begun(self, method):
        return [args for _, what, args in self.backend.begun if what == method]

    def lose(self, job):
        self.backend.lose(job.call.bulk[0])


def taken(n):
    return (n, f"picture {n} by sha-0", f"mark of picture {n} by sha-0")


def test_items_go_to_their_ranks_in_order_and_every_rank_has_all_before_the_update() -> None:
    desk = Desk(ranks=2, items=5)
    assert desk.round() == ["rank 0", "rank 1"]
    scores = [(n, {"look": [float(n)]}) for n in range(5)]
    assert desk.hosts[0].log == ["begin", taken(0), taken(2), taken(4), scores, "update"]
    assert desk.hosts[1].log == ["begin", taken(1), taken(3), scores, "update"]
    assert desk.dispatcher.forwards["learner"] == 5 * 5
    assert desk.dispatcher.seconds["learner"] == 5 * 1.0 + 2 * 2.0
    desk.group.update(1)
    assert desk.hosts[0].log[-2:] == ["update", "update"], "scores are seen once a round"


def test_a_rank_takes_items_while_later_ones_are_drawn() -> None:
    desk = Desk()
    desk.backend.seconds = {"draw": 3.0, "take": 1.0}
    desk.round()
    order = [what for _, what, _ in desk.backend.begun if what in {"draw", "take", "update"}]
    assert order == ["draw", "draw", "take", "draw", "take", "draw", "take", "take", "update"]


def test_a_rank_has_two_items_at_most_and_the_pools_go_on_while_it_is_waited_for() -> None:
    desk = Desk(items=6)
    desk.backend.seconds = {"take": 10.0}
    desk.dispatcher.wait(desk.collected[0].jobs)
    desk.group.begin(desk.items)
    start = desk.backend.clock()
    for one in desk.collected[:UNANSWERED]:
        desk.arrive(one)
    assert desk.backend.clock() < start + 1, "nobody waited"
    desk.arrive(desk.collected[2])
    assert desk.backend.clock() == pytest.approx(start + 10, abs=1)
    assert all(job.done for one in desk.collected for job in one.jobs)
    assert desk.backend.handles["learner-0"].most == UNANSWERED


def test_arrays_are_let_go_once_their_rank_has_them_and_records_stay() -> None:
    desk = Desk(items=3)
    desk.group.begin(desk.items)
    for one in desk.collected:
        desk.arrive(one)
    held = [[job.call is not None for job in one.jobs] for one in desk.collected]
    assert held == [[False, False], [True, True], [True, True]], (
        "the third is on its way, so the first was acknowledged"
    )
    desk.group.update(0)
    for one in desk.collected:
        assert all(job.call is None and not job.given and job.done for job in one.jobs)
        assert one.share().scores


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("which", ["draw", "mark", "both"])
def test_an_input_that_is_lost_in_the_middle_is_made_again_and_all_come_in_order(ranks, which) -> None:
    desk = Desk(ranks, items=7)
    desk.backend.seconds = {"take": 5.0}
    desk.group.begin(desk.items)
    for one in desk.collected:
        desk.dispatcher.wait(one.jobs)
        if one.item.position == 2:
            for job in one.jobs[{"draw": 0, "mark": 1, "both": 0}[which] : {"draw": 1, "mark": 2, "both": 2}[which]]:
                desk.lose(job)
        desk.group.take(one)
    desk.group.update(0)
    for host in desk.hosts:
        mine = [taken(n) for n in range(7) if n % ranks == host.number]
        assert [entry for entry in host.log if isinstance(entry, tuple)] == mine
    assert sorted(args[0] for args in desk.begun("draw")) == [0, 1, 2, 2, 3, 4, 5, 6], "nobody else's runs again"
    assert desk.dispatcher.forwards["learner"] == 7 * 5, "what was refused is not counted"
    assert desk.notes == ["an input of the learner is gone (object is gone); round 0 a[2] is made again"]


def test_an_item_behind_whose_own_input_went_too_is_made_again_at_its_turn() -> None:
    desk = Desk()
    desk.group.begin(desk.items)
    desk.dispatcher.wait([job for one in desk.collected for job in one.jobs])
    for one in desk.collected[1:3]:
        desk.lose(one.jobs[0])
    for one in desk.collected:
        desk.group.take(one)
    desk.group.update(0)
    assert desk.hosts[0].log[1:5] == [taken(n) for n in range(4)]
    assert sorted(args[0] for args in desk.begun("draw")) == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("what", "drawn", "marked"), [("trajectory", 2, 1), ("answer", 1, 2)])
def test_whoever_made_a_bad_input_is_blamed_and_nobody_else(what, drawn, marked) -> None:
    desk, blamed = Desk(), []
    blame = desk.dispatcher.blame

    def blaming(job, why) -> None:
        blamed.append((job.label, why))
        blame(job, why)

    desk.dispatcher.blame = blaming
    desk.hosts[0].bad = [what]
    desk.round()
    assert blamed == [("drawing 0" if what == "trajectory" else "marking 0", f"{what}: is not finite")]
    counts = [sum(args[0] == 0 for args in desk.begun(method)) for method in ("draw", "score")]
    assert counts == [drawn, marked]
    assert desk.hosts[0].log[1:5] == [taken(n) for n in range(4)]


def test_an_input_that_is_lost_again_and_again_stops_the_run() -> None:
    desk = Desk()
    desk.group.begin(desk.items)
    desk.dispatcher.wait(desk.collected[0].jobs)
    send = desk.group._send

    def losing(rank, collected):
        sent = send(rank, collected)
        if collected.item.position == 0:
            desk.lose(collected.jobs[1])
        return sent

    desk.group._send = losing
    desk.group.take(desk.collected[0])
    with pytest.raises(Stopped, match="inputs of the learner were lost again and again"):
        desk.group.update(0)
    assert len([note for note in desk.notes if "is gone" in note]) == MAX_TRIES
    assert desk.hosts[0].log == ["begin"]


def test_a_round_that_begins_again_forgets_what_was_under_way() -> None:
    desk = Desk(items=2)
    desk.group.begin(desk.items)
    desk.arrive(desk.collected[0])
    desk.group.begin(desk.items)
    for one in desk.collected:
        desk.arrive(one)
    desk.group.update(0)
    assert desk.hosts[0].log[:2] == ["begin", taken(0)]
    assert desk.hosts[0].log[2:] == [
        "begin",
        taken(0),
        taken(1),
        [(0, {"look": [0.0]}), (1, {"look": [1.0]})],
        "update",
    ]


def test_waiting_is_the_time_in_which_a_rank_had_nothing_to_do(monkeypatch) -> None:
    desk = Desk(items=3)
    monkeypatch.setattr("opd_ray.runtime.group.time.perf_counter", desk.backend.clock)
    desk.backend.seconds = {"draw": 4.0, "take": 1.0}  # as long as the rank says it took
    desk.group.begin(desk.items)
    start = desk.backend.clock()
    for one in desk.collected:
        desk.arrive(one)
    arrived = desk.backend.clock() - start
    desk.group.update(0)
    assert desk.group.idle == pytest.approx(arrived - 2 * 1.0), (
        "while two items were drawn, it was at work for a second"
    )


def test_errors_of_the_work_itself_are_not_tried_again() -> None:
    desk = Desk()
    desk.hosts[0].take = lambda share, *arrays: 1 / 0
    with pytest.raises(ZeroDivisionError):
        desk.round()
    assert not desk.notes


def test_the_rank_that_is_lost_while_another_answers_for_all_is_the_one_that_is_named() -> None:
    desk = Desk(ranks=3, sharded=True)
    desk.backend.hanging = {("learner-2", "save")}
    with pytest.raises(LearnerLostError, match="writing a checkpoint: learner rank 2 did not answer"):
        desk.group.save(Path("run"), 3, {}, attempt=0, keep=1)


@pytest.mark.parametrize("sharded", [False, True])
def test_where_weights_are_sharded_every_rank_takes_part_in_what_the_first_gives(sharded) -> None:
    desk = Desk(ranks=2, sharded=sharded)
    published, average = desk.group.publish(), desk.group.average()
    assert (published.sha256, average.sha256) == ("sha of 0", "sha of 0")
    assert desk.group.save(Path("run"), 3, {}, attempt=0, keep=1) == "path of 0"
    desk.group.export(Path("lora"))
    desk.round()  # what was not waited for is heard of
    asked = [("publish", False), ("publish", True), ("save", 3), ("export", "lora")]
    assert desk.hosts[0].log[:4] == asked
    assert desk.hosts[1].log[:4] == asked if sharded else desk.hosts[1].log[0] == "begin"


def losing(desk, method, times):
    """What the next calls of a method returned is gone before anybody reads it."""
    left = [times]

    def before_wait() -> None:
        for handle in desk.backend.handles.values():
            for request in handle.requests:
                if request.method == method and left[0] and request.args[-1] in desk.backend.store:
                    left[0] -= 1
                    desk.backend.lose(request.args[-1])

    desk.backend.before_wait = before_wait


def test_a_checkpoint_that_is_lost_on_its_way_to_the_clerk_is_a_lost_learner() -> None:
    desk = Desk(ship=True)
    assert desk.group.save(Path("run"), 3, {}, attempt=0, keep=1) == "path of state of 0"
    losing(desk, "commit", 1)
    with pytest.raises(LearnerLostError, match="what commit of the run folder was to take from the learner is gone"):
        desk.group.save(Path("run"), 4, {}, attempt=0, keep=1)


def test_a_checkpoint_that_is_lost_on_its_way_to_the_ranks_is_read_again() -> None:
    desk = Desk(ranks=2, ship=True)
    losing(desk, "take_back", 1)
    assert desk.group.restore(Path("run")) == (3, {"of": "checkpoint"}, ["a note"])
    assert len(desk.begun("newest")) == 2 and "is read again" in desk.notes[0]
    losing(desk, "take_back", 1000)
    with pytest.raises(Stopped, match=f"lost {MAX_TRIES} times"):
        desk.group.restore(Path("run"))


def test_ranks_that_rest_may_die() -> None:
    desk = Desk()
    desk.backend.beats = True
    desk.round()
    desk.group.rest()
    desk.backend.handles["learner-0"].die()
    for _ in range(200):
        desk.dispatcher._pump([desk.group.ranks[0].call("update", 0, bulk=0).done])
    assert not desk.notes
