"""How a round is cut into work items, and to whom each goes."""

from dataclasses import dataclass, field, replace

import pytest

from opd_ray.algorithms.opd import Opd
from opd_ray.config import OpdConfig, parse
from opd_ray.experience import RecordedSource, RolloutSource, cut, cut_states
from opd_ray.prompts import PromptStream
from opd_ray.runtime.handle import Call, Done, Weights
from opd_ray.runtime.hosts import Drawn
from opd_ray.scoring import Judges, Panel
from opd_ray.types import Prompt, Scored, WeightVersion

WEIGHTS = Weights(WeightVersion(0, 0, 4), "abc")
TASKS = {"left": "two", "right": "one", "both": "one"}


@dataclass
class Recorder:
    """Takes jobs and starts none."""

    jobs: list = field(default_factory=list)

    def submit(self, job):
        self.jobs.append(job)
        return job


def config_of(**batch):
    return parse(
        {
            "name": "x",
            "rounds": 9,
            "model": {"path": "nowhere"},
            "prompts": {"train": "rows.csv"},
            "batch": {"images_per_task": 4, "item_size": 2} | batch,
            "teachers": {"two": {"lora": "b", "tasks": ["left"]}, "one": {"lora": "a", "tasks": ["right", "both"]}},
        },
        "test",
    )


def judges(recorder):
    return Judges(recorder, [Panel("reward", ("a",)), Panel("reward.b", ("b", "c"))])


def stream_of(count=10):
    return PromptStream({task: [Prompt(f"{task}{n}", f"{task} {n}", task) for n in range(count)] for task in TASKS}, 0)


def names(items):
    return [(one.task, one.index, one.position) for one in items]


def test_a_round_is_cut_in_task_and_item_order():
    items = cut(config_of(), Opd(OpdConfig()), stream_of(), 5)
    assert names(items) == [
        *(("left", 0, 0), ("left", 1, 1)),
        *(("right", 0, 2), ("right", 1, 3)),
        *(("both", 0, 4), ("both", 1, 5)),
    ]
    assert all(one.round == 5 and len(one.prompts) == 2 and one.steps == tuple(range(9)) for one in items)
    assert {prompt.task for one in items for prompt in one.prompts if one.task == "left"} == {"left"}


def test_rounds_go_through_the_prompts_once_an_epoch():
    taken = [
        p.id for n in range(5) for one in cut(config_of(), Opd(OpdConfig()), stream_of(20), n) for p in one.prompts
    ]
    assert len(taken) == len(set(taken)) == 60
    assert cut(config_of(), Opd(OpdConfig()), stream_of(), 3) == cut(config_of(), Opd(OpdConfig()), stream_of(), 3)


def test_tasks_take_turns_and_go_on_where_they_were():
    """Two rounds of all three tasks, and six of one each: the same prompts, in the same order for each task."""
    together, in_turn = config_of(), config_of(tasks="in_turn")
    rounds = [cut(in_turn, Opd(OpdConfig()), stream_of(), n) for n in range(6)]
    assert [names(items) for items in rounds] == [[(task, 0, 0), (task, 1, 1)] for task in (*TASKS, *TASKS)]
    taken = {task: [p for items in rounds for one in items if one.task == task for p in one.prompts] for task in TASKS}
    whole = [one for n in range(2) for one in cut(together, Opd(OpdConfig()), stream_of(), n)]
    assert taken == {task: [p for one in whole if one.task == task for p in one.prompts] for task in TASKS}


def test_images_of_a_prompt_stay_together_and_are_numbered():
    items = cut(config_of(images_per_prompt=2), Opd(OpdConfig()), stream_of(), 0)
    assert all(one.prompts[0] == one.prompts[1] and one.samples == (0, 1) for one in items)
    assert len({one.prompts[0].id for one in items}) == 6


def test_a_prompt_that_comes_twice_in_a_round_gets_another_number():
    for one in cut(config_of(item_size=4), Opd(OpdConfig()), stream_of(2), 0):
        assert len(set(zip(one.prompts, one.samples, strict=True))) == 4
    pairs = [
        pair
        for one in cut(config_of(), Opd(OpdConfig()), stream_of(2), 0)
        for pair in zip(one.prompts, one.samples, strict=True)
    ]
    assert len(set(pairs)) == len(pairs) == 12


def test_steps_are_the_items_own():
    items = [one for n in range(4) for one in cut(config_of(), Opd(OpdConfig(steps_per_item=2)), stream_of(), n)]
    assert all(len(one.steps) == 2 for one in items)
    assert len({one.steps for one in items}) > 6


@pytest.mark.parametrize("first", [0, 1, 2, 7])
def test_every_item_goes_to_its_own_teacher_whatever_the_round(first):
    """A counter that starts at 0 in a resumed run sends prompts to another task's teacher."""
    recorder, algorithm = Recorder(), Opd(OpdConfig())
    pools = {"one": "pool one", "two": "pool two"}
    source = RolloutSource(
        config_of(), algorithm, stream_of(), recorder, rollout="rollout", teachers=pools, judges=judges(recorder)
    )
    for number in range(first, first + 2):
        batch = source.collect(number, WEIGHTS)
        assert batch.version == WEIGHTS.version and len(batch.jobs) == 2 * len(batch.items)
        for one, collected in zip(batch.items, batch.collected, strict=True):
            draw, mark = collected.jobs  # no scores: distillation needs no rewards
            teacher = TASKS[one.task]
            assert draw.pool == "rollout" and draw.args == (one, WEIGHTS.version, "abc", 8, False)
            assert draw.weights is WEIGHTS
            assert mark.pool == pools[teacher] and mark.label == f"{teacher} marking {one}" and mark.after == (draw,)
    assert source.cursors(3) == dict.fromkeys(TASKS, 12)


@pytest.mark.parametrize(
    ("steps", "last", "chunks", "ends"),
    [
        ((0, 2, 8), 8, 1, [8]),
        ((0, 2, 8), 8, 2, [4, 8]),
        ((8,), 8, 3, [3, 6, 8]),  # the last is the shortest: nothing is drawn while it is marked
        ((0, 2, 4), 10, 2, [2, 10]),  # down to the image
        ((0, 2), 2, 9, [1, 2]),  # no part without a step
        ((0,), 0, 2, [0]),
        ((0,), 10, 2, [10]),
    ],
)
def test_a_drawing_is_cut_into_equal_runs_up_to_the_last_trained_step(steps, last, chunks, ends):
    runs = cut_states(steps, last, chunks)
    assert [states[-1] for states in runs] == ends
    assert [state for states in runs for state in states] == list(range(last + 1))


@pytest.mark.parametrize("needs_rewards", [False, True])
def test_each_part_of_a_drawing_is_a_job_after_the_part_before_and_is_marked_as_it_is_there(needs_rewards):
    class WithScores(Opd):
        pass

    WithScores.needs_rewards = needs_rewards
    recorder, algorithm = Recorder(), WithScores(OpdConfig())
    config = config_of()
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"step_chunks": 3})})
    source = RolloutSource(
        *(config, algorithm, stream_of(), recorder),
        rollout="draw",
        teachers={"one": "1", "two": "2"},
        judges=judges(recorder),
    )
    item = replace(cut(config, algorithm, stream_of(), 0)[0], steps=(0, 1, 8))
    collected = source._item(item, WEIGHTS)
    draws, marks = (collected.producers[what] for what in ("trajectory", "answer"))
    assert collected.jobs[: len(draws) + len(marks)] == (*draws, *marks)
    assert all(draw.weights is WEIGHTS and draw.pool == "draw" and draw.bulk == 2 for draw in draws)
    assert [draw.after for draw in draws] == [(), (draws[0],), (draws[0], draws[1])]
    assert [mark.after for mark in marks] == [(draws[0],), (draws[0], draws[2])], "no trained step in 4 to 6"
    for number, draw in enumerate(draws):
        draw.result = Done(Drawn(f"record {number}", f"images {number}"), 0.0, 0)
        draw.call = Call((f"states {number}", f"pictures {number}"), None)
    last = 10 if needs_rewards else 8
    named = (item, WEIGHTS.version, "abc")
    assert [draw.arguments() for draw in draws] == [
        (*named, 3, False),
        (*named, 6, False, ("record 0",), "states 0"),
        (*named, last, needs_rewards, ("record 0", "record 1"), "states 0", "states 1"),
    ]
    assert [mark.arguments() for mark in marks] == [
        (("record 0",), "two", "states 0"),
        (("record 0", "record 2"), "two", "states 0", "states 2"),
    ]
    for mark in marks:
        mark.result = Done(f"mark {marks.index(mark)}", 0.0, 0)
    if needs_rewards:
        scores = collected.jobs[-2:]
        assert [score.pool for score in scores] == ["reward", "reward.b"], "each reward of its own workers apart"
        for score, rewards in zip(scores, ("a", "bc"), strict=True):
            assert score.after == (draws[2],) and score.arguments()[1:] == ("images 2", "pictures 2")
            score.result = Done(Scored({name: [1.0, 2.0] for name in rewards}, {}), 0.0, 0)
        assert sorted(collected.share().scores.scores) == ["a", "b", "c"]
    share = collected.share()
    assert share.trajectory == ("record 0", "record 1", "record 2") and share.answer == ("mark 0", "mark 1")


def test_recordings_are_items_of_their_own_and_each_is_read_once_an_epoch():
    recorder = Recorder()
    recordings = {"left": ("a", "b", "c", "d"), "right": ("e", "f")}
    source = RecordedSource(config_of(), Opd(OpdConfig()), recordings, recorder, "reader")
    rounds = [source.collect(number, WEIGHTS) for number in range(2)]
    assert names(rounds[0].items) == [("left", 0, 0), ("left", 1, 1), ("right", 0, 2), ("right", 1, 3)]
    read = [job.args for job in recorder.jobs]
    assert all(job.pool == "reader" and job.method == "read" for job in recorder.jobs)
    assert sorted(name for task, name in read if task == "left") == ["a", "b", "c", "d"]
    assert sorted(name for task, name in read if task == "right") == ["e", "e", "f", "f"]
    assert source.cursors(2) == {"left": 4, "right": 4}
