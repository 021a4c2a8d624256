"""What a person may ask, what goes into a checkpoint, and what status.json says of the roles. Pools are stand-ins."""

import json
from types import SimpleNamespace

import pytest

from opd_ray.config import Autoscale
from opd_ray.errors import ConfigError
from opd_ray.runtime.scaling import Scaler
from opd_ray.runtime.usage import Meter, PoolStatus, Usage


class Pool:
    def __init__(self, role, size=1, teachers=()):
        self.spec, self.size = SimpleNamespace(role=role), size
        self.usage, self.about = Usage(), {"teachers": teachers}

    def resize(self, size):
        self.size = size

    def describe(self):
        return PoolStatus(self.spec.role, wanted=self.size, **self.about)

    def work(self, seconds=1.0, **more):
        """So many wall seconds more, and what else was counted in them."""
        added = Usage(seconds=seconds, workers=self.size * seconds, **more)
        old = self.usage
        self.usage = Usage(*(getattr(old, name) + getattr(added, name) for name in Usage.__slots__))


def pools(*made):
    return {pool.spec.role: pool for pool in made}


@pytest.fixture
def apart():
    return pools(
        Pool("rollout"),
        Pool("teacher.text", 2, ("text",)),
        Pool("teacher.compose", 1, ("compose",)),
        Pool("reward"),
    )


@pytest.fixture
def shared():
    return pools(Pool("rollout"), Pool("teacher", 2, ("text", "compose")))


def test_roles_and_bare_teacher_names(apart):
    scaler = Scaler(apart)
    assert scaler.request({"rollout": 2, "text": 3, "teacher.compose": 1}) == (
        "rollout 1 -> 2\nteacher.text 2 -> 3\nteacher.compose is 1 already"
    )
    assert scaler.targets() == {"rollout": 2, "teacher.text": 3, "teacher.compose": 1, "reward": 1}
    assert scaler.request({"text": 1}) == "teacher.text 3 -> 1"
    assert scaler.request({"text": 2, "teacher.text": 2}) == "teacher.text 1 -> 2"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"nobody": 2}, "no role 'nobody'; known: rollout, teacher.text, teacher.compose, reward"),
        ({"teacher": 2}, "no role 'teacher'; known: rollout, teacher.text, teacher.compose, reward"),
        ({"text": 0}, "teacher.text=0: it has work to do in every round; the least is 1"),
        ({"rollout": 0}, "rollout=0: it has work to do in every round; the least is 1"),
        ({"rollout": -1}, "rollout=-1: expected a number of workers from 1 on"),
        ({"rollout": 10**6}, "rollout=1000000: more than 1000 workers; expected a smaller number"),
        ({"learner": 2}, "the learner cannot be scaled: its ranks are fixed for the run"),
        ({"text": 2, "teacher.text": 3}, "teacher.text is asked to be 2 and 3; give one number"),
        ({}, "nothing to scale; known: rollout, teacher.text, teacher.compose, reward"),
    ],
)
def test_refusals_change_nothing(apart, targets, expected):
    scaler = Scaler(apart)
    with pytest.raises(ConfigError) as refused:
        scaler.request({"reward": 5, **targets} if targets else {})
    assert str(refused.value) == expected
    assert scaler.targets() == {"rollout": 1, "teacher.text": 2, "teacher.compose": 1, "reward": 1}


@pytest.mark.parametrize("name", ["text", "teacher.text"])
def test_shared_teachers_are_one_role(shared, name):
    scaler = Scaler(shared)
    with pytest.raises(ConfigError, match=f"^teachers are shared: scale `teacher`, not {name}$"):
        scaler.request({name: 3})
    assert scaler.request({"teacher": 3}) == "teacher 2 -> 3"


def test_a_run_may_have_nothing_to_scale(apart):
    with pytest.raises(ConfigError, match=r"^all roles share one copy$"):
        Scaler(apart, fixed="all roles share one copy").request({"rollout": 2})


def test_an_autoscaled_role_stays_within_its_limits(apart):
    scaler = Scaler(apart, {"rollout": Autoscale(max=4), "reader": Autoscale(max=2)})
    with pytest.raises(ConfigError, match=r"^rollout=5: autoscale keeps it within 1 to 4$"):
        scaler.request({"rollout": 5})
    assert scaler.request({"rollout": 4}) == "rollout 1 -> 4"


def test_targets_come_back_with_the_checkpoint(apart):
    scaler = Scaler(apart)
    scaler.request({"rollout": 3, "text": 1})
    saved = json.loads(json.dumps(scaler.state()))
    assert saved == {"rollout": [1, 3], "teacher.text": [2, 1], "teacher.compose": [1, 1], "reward": [1, 1]}
    later = Scaler(pools(Pool("rollout"), Pool("teacher.text", 2), Pool("reward")))
    assert later.restore(saved) == ["rollout 1 -> 3, as before", "teacher.text 2 -> 1, as before"]
    assert later.targets() == {"rollout": 3, "teacher.text": 1, "reward": 1}
    assert later.state() == {"rollout": [1, 3], "teacher.text": [2, 1], "reward": [1, 1]}, "also the next time"


def test_a_number_that_was_changed_in_the_file_was_meant():
    scaler = Scaler(pools(Pool("rollout", 2), Pool("reward")), {"reward": Autoscale(max=2)})
    assert scaler.restore({"rollout": [1, 5], "reward": [1, 3], "gone": [1, 2]}) == []
    assert scaler.targets() == {"rollout": 2, "reward": 1}, "and limits that were changed, too"


def busy_for(pool, scaler, seconds, **each):
    lines = []
    for _ in range(seconds):
        pool.work(**each)
        lines += scaler.tick()
    return lines


def test_autoscale_acts_on_its_own_roles_and_waits_for_workers_that_start(apart):
    scaler = Scaler(apart, {"teacher.text": Autoscale(max=8)})
    text, rollout = apart["teacher.text"], apart["rollout"]
    rollout.work(seconds=100, queued=100, answers=100)
    assert busy_for(text, scaler, 29, queued=0.9, answers=1, busy=1.9) == []
    assert busy_for(text, scaler, 3, queued=0.9, answers=1, busy=1.9) == ["autoscale: teacher.text 2 -> 4"]
    assert scaler.targets()["rollout"] == 1
    text.about["starting"] = 2
    assert busy_for(text, scaler, 300, queued=0.9, answers=1, busy=1.9) == []
    text.about["starting"] = 0
    assert busy_for(text, scaler, 95, queued=0.9, answers=1, busy=3.9) == ["autoscale: teacher.text 4 -> 8"]
    scaler.request({"text": 1})
    assert busy_for(text, scaler, 60, queued=0.9, answers=1, busy=1.0) == [], "a person's word stands for a while"


def test_the_meter_shows_the_last_seconds():
    pool = Pool("rollout", 2)
    pool.about |= {"healthy": 2, "weights": "0.0.3", "memory_mb": 812.0}
    meter = Meter(pools(pool))
    (row,) = meter.roles()
    assert (row["busy"], row["rate"]) == (None, None)
    for _ in range(30):
        pool.work(busy=1.0, answers=1)
        (row,) = meter.roles()
    assert (row["busy"], row["rate"]) == (0.5, 60.0)
    for _ in range(10):
        pool.work(busy=2.0, answers=3)
        (row,) = meter.roles()
    assert (row["busy"], row["rate"]) == (1.0, 180.0), "nothing older than the window"
    assert row == json.loads(json.dumps(row))
    assert (row["role"], row["wanted"], row["healthy"], row["weights"]) == ("rollout", 2, 2, "0.0.3")
    assert row["starting"] == row["queue"] == row["lost"] == 0 and row["teachers"] == [] and row["memory_mb"] == 812.0


def test_long_jobs_are_seen_over_a_longer_time():
    """One of 30 s after the other by one worker: it is always busy, and says so twice a minute."""
    pool = Pool("teacher", 1, ("text",))
    meter, shown = Meter(pools(pool)), []
    for second in range(1, 601):
        done = second % 30 == 0
        pool.work(busy=30.0 * done, answers=int(done))
        (row,) = meter.roles()
        shown.append((row["busy"], row["rate"]))
    late = shown[240:]
    assert all(0.7 < busy <= 1 and 1.5 < rate < 2.6 for busy, rate in late)
    assert len(meter._seen["teacher"]) < 130


def test_a_pool_without_workers_has_no_share():
    pool = Pool("reward", 0)
    meter = Meter(pools(pool))
    pool.work()
    assert (meter.roles()[0]["busy"], meter.roles()[0]["rate"]) == (None, 0.0)
