"""Who is given up, when, and what is told of it: over a backend in memory, where time passes in waiting alone."""

import pytest

from opd_ray.errors import BadInputError, InputLostError, Stopped
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import WorkerSpec
from opd_ray.runtime.health import Health, State
from opd_ray.runtime.jobs import MAX_KILLED, MAX_RUNS, Job, Output
from opd_ray.runtime.pool import MAX_STRIKES, Pool
from opd_ray.runtime.roster import Worker
from opd_ray.runtime.watch import Watch
from tests.runtime.fake import Critic, FakeBackend, Painter, weights

CALL_S, BEAT_S, PAUSE_S, START_S = 600.0, 60.0, 90.0, 300.0


class Studio:
    """Painters and critics that give signs of life."""

    def __init__(self, painters=1, critics=1, painter=Painter, critic=Critic, logs=None) -> None:
        self.backend = FakeBackend(beats=True)
        clock = self.backend.clock
        self.dispatcher = Dispatcher(self.backend, call_timeout_s=CALL_S, pause_timeout_s=PAUSE_S, clock=clock)
        self.notes = []
        self.dispatcher.note = self.notes.append
        self.painters = self.pool("rollout", painter, painters, logs)
        self.critics = self.pool("teacher.text", critic, critics, logs)
        self.weights = weights(self.backend, 0)

    def pool(self, role, factory, size, logs):
        pool = Pool(
            self.backend,
            WorkerSpec(role, factory, 1, {}, logs),
            size,
            clock=self.backend.clock,
            start_timeout_s=START_S,
            call_timeout_s=CALL_S,
            beat_timeout_s=BEAT_S,
        )
        self.dispatcher.pools.append(pool)
        return pool

    def open(self):
        self.dispatcher.wait_ready()
        return self

    def draw(self, number):
        args = (number, self.weights.version, self.weights.sha256)
        return self.dispatcher.submit(Job(self.painters, "draw", args, 1, f"drawing {number}", weights=self.weights))

    def mark(self, draw, number=0):
        job = Job(self.critics, "score", lambda: (draw.result.value, Output(draw, 0)), 1, f"marking {number}")
        job.after = (draw,)
        return self.dispatcher.submit(job)

    def value(self, job):
        return self.backend.store[job.call.bulk[0]]

    def begun(self, method):
        return [name for name, what, _ in self.backend.begun if what == method]

    def during_draws(self, what, *numbers):
        """Do something to whichever worker has begun to draw one of these."""

        def look() -> None:
            for handle in list(self.backend.handles.values()):
                first = handle.requests[0] if handle.requests else None
                if first is not None and first.ends is not None and first.method == "draw" and first.args[0] in numbers:
                    what(handle)

        self.backend.before_wait = look


@pytest.fixture
def studio(tmp_path):
    made = Studio(logs=tmp_path).open()
    made.logs = tmp_path
    return made


def test_a_frozen_worker_is_replaced_long_before_its_call_would_be_late(studio) -> None:
    studio.backend.seconds["draw"] = 400.0
    (studio.logs / "rollout-0.log").write_text("loading\n\nFile pipeline.py, line 7 in forward\n")
    studio.dispatcher.wait([studio.draw(0), studio.draw(1)])
    assert not studio.painters.lost, "who is slow and gives signs of life is waited for"
    frozen, start = studio.draw(2), studio.backend.clock()
    studio.backend.hanging, studio.backend.frozen = {("rollout-0", "draw")}, {"rollout-0"}
    studio.dispatcher.wait([frozen])
    assert studio.backend.clock() - start - 400 < BEAT_S + BEAT_S / 6 + 5
    (note,) = studio.notes
    assert note.startswith(
        "rollout-0 (node here, pid 1) was lost while drawing 2 (no sign of life in 60 s); 1 work items run again"
    )
    assert "before, with 100 MB; last in rollout-0.log: loading | File pipeline.py, line 7 in forward" in note
    assert studio.backend.killed == ["rollout-0"]


def test_a_worker_that_freezes_before_its_first_sign_of_life_is_found_too(studio) -> None:
    studio.backend.frozen = {"teacher.text-1"}
    studio.backend.handles["teacher.text-0"].die()
    studio.backend.hanging = {("teacher.text-1", "score")}
    start, mark = studio.backend.clock(), studio.mark(studio.draw(0))
    studio.dispatcher.wait([mark])
    assert studio.backend.clock() - start < BEAT_S + 5
    assert "teacher.text-1 was lost while marking 0 (no sign of life in 60 s)" in studio.notes[1]


def test_a_worker_is_asked_for_a_sign_of_life_as_soon_as_it_is_up() -> None:
    """Of one that dies at its first work it is known then where it ran."""
    studio = Studio()
    studio.painters.fill()
    (worker,) = studio.painters.workers
    studio.backend.wait([worker.ready.done], 5.0)
    for ref in (worker.ready.done, lambda: worker.beat.done):
        ref = ref() if callable(ref) else ref
        studio.painters.finish(ref, studio.backend.result(ref))
    studio.painters.condemn(worker, "a test")
    assert studio.painters.lost[0].startswith("rollout-0 (node here, pid 1) was lost while idle (a test)")


def test_an_idle_worker_that_freezes_is_replaced_before_there_is_work_for_it(studio) -> None:
    studio.backend.frozen = {"teacher.text-0"}
    studio.backend.seconds["draw"] = 100.0
    studio.dispatcher.wait([studio.draw(0)])
    assert [worker.handle.name for worker in studio.critics.workers] == ["teacher.text-1"]
    assert "was lost while idle (no sign of life" in studio.notes[0]


def test_the_stacks_of_a_suspect_are_asked_for_once_and_before_it_is_ended(studio) -> None:
    studio.backend.hanging = {("rollout-0", "draw")}
    asked = []
    studio.dispatcher.tick = lambda: asked.append((len(studio.backend.stacks), len(studio.backend.killed)))
    studio.dispatcher.wait([studio.draw(0)])
    assert studio.backend.stacks == ["rollout-0"]
    assert (1, 0) in asked and asked.index((1, 0)) == pytest.approx(CALL_S / 2, abs=5)
    assert "(no answer in 600 s)" in studio.notes[0]


STACKS = """loaded
Timeout (0:00:45)!
Thread 0x00007f74099536c0 (most recent call first):
  File "/python3.11/re/__init__.py", line 166 in match
  File "/rewards.py", line 50 in score
  File "/opd_ray/actors/reward.py", line 31 in score
  File "/opd_ray/runtime/hosts.py", line 108 in score
  File "/opd_ray/runtime/process.py", line 69 in call
  File "/ray/_private/function_manager.py", line 740 in actor_method_executor

Current thread 0x00007f740a1546c0 (most recent call first):
  File "/opd_ray/runtime/process.py", line 75 in beat
  File "/ray/_private/function_manager.py", line 740 in actor_method_executor

Thread 0x00007f740a1546c1 (most recent call first):
  <no Python frame>

Thread 0x00007f74cdbff6c0 (most recent call first):
  File "/python3.11/threading.py", line 327 in wait
  File "/ray/_private/gc_collect_manager.py", line 29 in run

Thread 0x00007f7520c97b80 (most recent call first):
  File "/ray/_private/worker.py", line 1069 in main_loop
  File "/ray/_private/workers/default_worker.py", line 323 in <module>
"""


@pytest.mark.parametrize("after", ["", "Segmentation fault\n"])
def test_of_a_wedged_workers_stacks_the_note_has_where_it_is(after, studio) -> None:
    (studio.logs / "rollout-0.log").write_text(STACKS + after)
    studio.backend.handles["rollout-0"].die()
    studio.dispatcher.wait([studio.draw(0)])
    told = studio.notes[0].partition("; last in rollout-0.log: ")[2].split(" | ")
    frames = [
        'File "/python3.11/re/__init__.py", line 166 in match',
        'File "/rewards.py", line 50 in score',
        'File "/opd_ray/actors/reward.py", line 31 in score',
        'File "/opd_ray/runtime/hosts.py", line 108 in score',
    ]
    before = ["Timeout (0:00:45)!"] if after else ["loaded", "Timeout (0:00:45)!"]
    assert told == [*before, *frames, *after.splitlines()]


def test_who_waits_for_a_worker_sees_it_and_stops_in_the_end(studio) -> None:
    studio.dispatcher.wait([studio.draw(0)])
    studio.backend.never_start = {"rollout-1"}
    studio.backend.handles["rollout-0"].die()
    seen, start = [], studio.backend.clock()
    studio.dispatcher.tick = lambda: seen.append(studio.dispatcher.paused())
    with pytest.raises(Stopped, match=r"waited 9\d s for a worker of rollout \(its last worker is gone") as caught:
        studio.dispatcher.wait([studio.draw(1)])
    assert caught.value.exit_code == 3 and "--resume" in str(caught.value)
    assert studio.backend.clock() - start == pytest.approx(PAUSE_S, abs=3)
    role, seconds, why = seen[-1]
    assert (role, why) == ("rollout", "its last worker is gone, and a successor starts")
    assert seconds == pytest.approx(PAUSE_S, abs=3)
    assert studio.notes[1:] == [f"waiting for rollout: {why}"], "said once"


def test_a_pause_ends_with_the_successor(studio) -> None:
    studio.backend.handles["rollout-0"].die()
    studio.dispatcher.wait([studio.draw(0)])
    assert studio.dispatcher.paused() is None


def test_whoever_made_a_bad_input_goes_and_its_reader_stays() -> None:
    class Particular(Critic):
        refused = 0

        def score(self, number, picture):
            if not Particular.refused:
                Particular.refused += 1
                raise BadInputError("trajectory", "NaN in it")
            return super().score(number, picture)

    studio = Studio(critic=Particular).open()
    draw = studio.draw(0)
    mark = studio.mark(draw)
    studio.dispatcher.wait([draw, mark])
    assert studio.value(mark) == "mark of picture 0 by sha-0"
    assert studio.backend.killed == ["rollout-0"] and not studio.critics.lost
    assert "its answer to drawing 0 cannot be: trajectory: NaN in it" in studio.notes[0]
    assert studio.begun("draw") == ["rollout-0", "rollout-1"]
    assert studio.begun("score") == ["teacher.text-0"] * 2


def test_an_input_that_is_bad_whoever_makes_it_stops_the_run_with_its_item() -> None:
    class Never(Critic):
        def score(self, number, picture):
            raise BadInputError("trajectory", "NaN in it")

    studio = Studio(critic=Never).open()
    with pytest.raises(Stopped, match=r"(drawing|marking) 7"):
        studio.dispatcher.wait([studio.mark(studio.draw(7), 7)])
    assert len(studio.painters.lost) <= MAX_RUNS


def test_what_was_abandoned_is_not_run_again_and_its_errors_reach_nobody(studio) -> None:
    studio.backend.seconds["draw"] = 5.0
    old = [studio.draw(n) for n in range(4)]
    failing = studio.dispatcher.submit(Job(studio.critics, "fail", (), 0, "failing"))
    studio.painters.assign()
    studio.painters.assign()
    studio.critics.assign()
    studio.dispatcher.abandon()
    studio.backend.handles["rollout-0"].die()
    fresh = studio.draw(9)
    studio.dispatcher.wait([fresh])
    assert [args[0] for _, what, args in studio.backend.begun if what == "draw"] == [9]
    assert not any(job.done for job in [*old, failing]) and failing.error is None


def test_a_worker_that_is_not_wanted_any_more_while_it_starts_goes_at_once() -> None:
    studio = Studio(painters=2).open()
    studio.painters.resize(4)
    starting = [worker.handle.name for worker in studio.painters.workers if worker.starting]
    studio.painters.resize(2)
    assert studio.backend.killed == starting == ["rollout-2", "rollout-3"]
    assert all(worker.health.state is State.HEALTHY for worker in studio.painters.workers)
    studio.dispatcher.wait([studio.draw(n) for n in range(4)])
    assert not studio.painters.lost


def test_a_growth_without_room_is_withdrawn_and_one_in_the_place_of_another_is_waited_for() -> None:
    studio = Studio(painters=2).open()
    studio.backend.seconds["draw"] = 10.0
    studio.dispatcher.wait([studio.draw(0)])
    studio.backend.never_start = {"rollout-2", "rollout-3"}
    studio.backend.lack = "no room for 1 workers"
    studio.painters.resize(3)
    studio.backend.handles["rollout-1"].die()
    studio.dispatcher.wait([studio.draw(n) for n in range(1, 80)])
    assert studio.painters.size == 2
    assert [worker.handle.name for worker in studio.painters.workers] == ["rollout-0", "rollout-3"]
    withdrawn, waited = (next(note for note in studio.notes if text in note) for text in ("withdrawn", "waited for"))
    assert withdrawn.startswith("rollout-2 ") and waited.startswith("rollout-3 ")


@pytest.mark.parametrize("answered", [False, True])
def test_eight_workers_that_go_at_once_with_their_node_do_not_stop_the_run(answered) -> None:
    studio = Studio(painters=8).open()
    studio.backend.seconds["draw"] = 5.0
    if answered:
        studio.dispatcher.wait([studio.draw(n) for n in range(16)])
    jobs = [studio.draw(n) for n in range(100, 116)]
    for _ in range(2):
        studio.painters.assign()
    for handle in [handle for name, handle in studio.backend.handles.items() if name.startswith("rollout")]:
        handle.die()
    studio.dispatcher.wait(jobs)
    assert len(studio.painters.lost) == 8
    assert [studio.value(job) for job in jobs] == [f"picture {n} by sha-0" for n in range(100, 116)]


@pytest.mark.parametrize("critics", [1, 3])
def test_a_teacher_that_dies_three_times_before_its_first_answer_stops_the_run_with_its_log(critics, tmp_path) -> None:
    """Also where others of its role answer: the line of successors is what is counted."""
    studio = Studio(critics=critics, logs=tmp_path).open()
    cursed = {"teacher.text-0"}

    def die() -> None:
        for name in cursed:
            (tmp_path / f"{name}.log").write_text("cannot map the weights\n")
            if any(request.method == "score" for request in studio.backend.handles[name].requests):
                studio.backend.handles[name].die()
        lost = len(studio.critics.lost)
        if lost > 0 and (name := f"teacher.text-{critics - 1 + lost}") in studio.backend.handles:
            cursed.add(name)

    studio.backend.before_wait = die
    studio.backend.seconds = {"draw": 1.0, "score": 0.5}
    jobs = [studio.mark(studio.draw(n), n) for n in range(60)]
    with pytest.raises(Stopped, match=rf"{MAX_STRIKES} teacher.text workers were lost one after the other") as caught:
        studio.dispatcher.wait(jobs)
    assert f"last in teacher.text-{critics + 1}.log: cannot map the weights" in str(caught.value)
    assert (critics > 1) == any(job.done for job in jobs)


def test_an_item_that_kills_three_workers_is_named_and_its_innocent_neighbours_are_not(tmp_path) -> None:
    studio = Studio(painters=3, logs=tmp_path).open()
    studio.backend.seconds["draw"] = 1.0
    studio.dispatcher.wait([studio.draw(n) for n in range(100, 106)])  # every worker has answered once
    studio.during_draws(lambda handle: handle.die(), 13)
    jobs = [studio.draw(n) for n in range(10, 20)]
    with pytest.raises(
        Stopped, match=r"drawing 13: 3 workers were lost .*; see .*rollout-\d.log. .*--resume"
    ) as caught:
        studio.dispatcher.wait(jobs)
    assert caught.value.exit_code == 3
    assert len(studio.painters.lost) == MAX_KILLED
    assert all("while drawing 13" in line for line in studio.painters.lost)


def test_a_successor_that_hangs_at_its_start_though_there_is_room_is_replaced() -> None:
    studio = Studio(painters=2).open()
    studio.backend.seconds["draw"] = 10.0
    studio.dispatcher.wait([studio.draw(0)])
    studio.backend.never_start = {"rollout-2"}
    studio.backend.handles["rollout-1"].die()
    studio.dispatcher.wait([studio.draw(n) for n in range(1, 80)])
    assert [worker.handle.name for worker in studio.painters.workers] == ["rollout-0", "rollout-3"]


def test_a_new_worker_that_cannot_be_made_does_not_end_a_run_that_goes_well() -> None:
    class Crowded(Painter):
        made = 0

        def __init__(self) -> None:
            super().__init__()
            Crowded.made += 1
            if Crowded.made > 1:
                raise MemoryError("the card is full")

    studio = Studio(painter=Crowded).open()
    studio.backend.seconds["draw"] = 5.0
    studio.dispatcher.wait([studio.draw(0)])
    studio.painters.resize(2)
    studio.dispatcher.wait([studio.draw(n) for n in range(1, 20)])
    assert studio.painters.size == 1 and len(studio.painters.workers) == 1
    assert any("rollout-1" in note and "MemoryError: the card is full" in note for note in studio.notes)
    assert any("withdrawn; rollout goes on with 1" in note for note in studio.notes)


def test_a_worker_that_was_added_and_stayed_is_waited_for_like_any_other_when_it_is_lost() -> None:
    studio = Studio(painters=1).open()
    studio.backend.seconds["draw"] = 5.0
    studio.dispatcher.wait([studio.draw(0)])
    studio.painters.resize(2)
    studio.dispatcher.wait([studio.draw(n) for n in range(1, 10)])
    studio.painters.resize(1)
    studio.dispatcher.wait([studio.draw(10)])
    studio.backend.handles[studio.painters.workers[0].handle.name].die()
    studio.dispatcher.wait([studio.draw(n) for n in range(11, 15)])
    assert studio.painters.size == 1


def test_one_bad_drawing_with_two_readers_costs_one_worker() -> None:
    class Blot(Painter):
        made = 0

        def __init__(self) -> None:
            super().__init__()
            Blot.made += 1
            self.number = Blot.made

        def draw(self, number, version, sha256):
            _, done = super().draw(number, version, sha256)
            return ("blot" if self.number == 1 else f"picture {number} by {sha256}"), done

    class Strict(Critic):
        def score(self, number, picture):
            if picture == "blot":
                raise BadInputError("trajectory", "a blot")
            return super().score(number, picture)

    studio = Studio(critics=2, painter=Blot, critic=Strict).open()
    draw = studio.draw(0)
    marks = [studio.mark(draw, n) for n in range(2)]
    studio.dispatcher.wait(marks)
    assert [worker.handle.name for worker in studio.painters.workers] == ["rollout-1"]
    assert len(studio.painters.lost) == 1 and not studio.critics.lost


def test_a_lost_record_that_is_no_jobs_costs_its_worker_and_not_the_learner() -> None:
    studio = Studio().open()
    studio.dispatcher.wait([studio.draw(0)])
    worker = studio.painters.workers[0]
    studio.backend.beats = True
    call = worker.handle.beat()
    worker.beat, studio.painters.pending[call.done] = call, worker
    studio.backend.outcomes[call.done] = InputLostError("the record was on a node that is gone")
    studio.dispatcher.wait([studio.draw(1)])
    assert [worker.handle.name for worker in studio.painters.workers] == ["rollout-1"]


def test_binds_that_nobody_needs_any_longer_fail_in_silence() -> None:
    studio = Studio(painters=3).open()
    studio.backend.seconds["bind"] = 5.0
    jobs = [studio.draw(n) for n in range(6)]
    studio.painters.assign()
    studio.backend.lose(studio.weights.flats[0])
    studio.dispatcher.abandon()
    studio.weights = weights(studio.backend, 1)
    again = [studio.draw(n) for n in range(6)]
    studio.dispatcher.wait(again)
    assert not any(job.done for job in jobs) and not studio.painters.lost


def test_a_teacher_that_has_to_be_loaded_may_take_the_configured_time() -> None:
    watch = Watch(600, 60)
    job = Job(None, "score", (), asset="a")
    for _ in range(5):
        watch.learn(job, 1.0)
    worker = Worker(None, Health(lambda: 0.0), None)
    worker.flying["a record"] = job
    assert watch.fault(worker, 599.0) == "", "it has not said that it has the teacher"
    worker.loaded = frozenset({"a"})
    assert watch.fault(worker, 59.0) == "" and watch.fault(worker, 61.0) == "no answer in 60 s"
    job.alike = False
    assert watch.fault(worker, 599.0) == ""
