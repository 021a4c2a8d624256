"""Twelve teachers in one worker, more than it may hold at a time: the run is the same to the last bit."""

import json

import pytest

from opd_ray.algorithms import make_algorithm
from opd_ray.config import ModelConfig
from opd_ray.errors import PlacementError
from opd_ray.models.teachers import Checkpoint
from opd_ray.planning import needs
from opd_ray.preflight import preflight
from opd_ray.roles import make_teacher
from tests.algorithms.parts import write_specialists
from tests.runtime.runs import go, same

LORAS = tuple(f"lora{number}" for number in range(9))
FULL = ("x", "y", "z")


@pytest.fixture(scope="module")
def config_of(make_config, tiny, tmp_path_factory):
    """A run with these teachers shared, and how many checkpoints fit beside the LoRAs."""
    folder = tmp_path_factory.mktemp("specialists")
    specialists = write_specialists(tiny, folder, LORAS, FULL)
    prompts = folder / "train.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a {name}", "task": name}) + "\n" for name in specialists))

    def make(limit_gb=None, **changes):
        run = {
            "rounds": 2,
            "teachers": {name: teacher.model_dump() for name, teacher in specialists.items()},
            "prompts": {"train": str(prompts)},
            "batch": {"images_per_task": 1, "item_size": 1},
            "algorithm": {"name": "opd", "steps_per_item": 1},
        }
        return make_config(cluster={"share_teachers": True, "teacher_memory_gb": limit_gb}, **run | changes)

    return make


@pytest.fixture(scope="module")
def sizes(config_of, tiny):
    """Bytes of base and LoRAs together, and of one checkpoint."""
    actor = make_teacher(config_of(), LORAS)
    network = actor.families["lora0"].network
    kept = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    return kept, Checkpoint(ModelConfig(path=str(tiny)), "cpu", network.dtype, text=False).nbytes()


@pytest.mark.verify
def test_a_run_under_a_limit_is_the_run_without_one(config_of, sizes, tmp_path) -> None:
    kept, own = sizes
    free, tight = go(config_of(), tmp_path / "free"), go(config_of((kept + own) / 1e9), tmp_path / "tight")
    assert same(free, tight)
    assert set(free.rows[-1]["loss"]) >= {*LORAS, *FULL}


def test_a_checkpoint_that_can_never_fit_is_refused_before_anything_is_loaded(config_of, sizes, tmp_path) -> None:
    kept, own = sizes
    config = config_of((own + own // 2) / 1e9)  # the base alone is as large as a checkpoint
    with pytest.raises(PlacementError, match=r"teacher 'x' needs .* together .* GB, more than cluster.teacher_memory"):
        preflight(config, make_algorithm(config))
    lora_bytes = kept - own
    config = config_of((2 * own + lora_bytes // 2) / 1e9)
    preflight(config, make_algorithm(config))
    with pytest.raises(PlacementError, match="teacher 'x' needs"):  # the worker counts the LoRAs too
        go(config, tmp_path / "run")


def test_a_plan_counts_no_more_than_the_limit(config_of, sizes) -> None:
    kept, own = sizes

    def teachers(limit):
        (need,) = [one for one in needs(config_of(limit, runtime="ray")) if one.role == "teachers"]
        return need

    free, tight = teachers(None), teachers((kept + own) / 1e9)
    assert free.weights == pytest.approx(tight.weights + free.own - tight.own) and tight.own < free.own
    assert tight.weights + tight.trained == pytest.approx((kept + own) / 1e9)
