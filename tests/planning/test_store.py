"""The object store: what a round puts there, against what a real round did, and what is refused."""

import pytest

from opd_ray.algorithms import make_algorithm
from opd_ray.errors import PlacementError
from opd_ray.models.base import family_class
from opd_ray.planning import round_bytes, rounds_that_fit
from opd_ray.preflight import preflight
from opd_ray.recipes import load

MB = 2**20


def demo(*overrides):
    config = load("demo", list(overrides))
    return config, make_algorithm(config)


def test_the_demos_round_by_hand() -> None:
    config, algorithm = demo("algorithm.steps_per_item=3")
    latent, prompt = 16 * 4 * 4, 77 * 2  # of the world's model: numbers of a state, and its least conditioning
    parts = round_bytes(config, algorithm, 3)
    pictures, items = 3 * 24, 3 * 2
    assert set(parts) == {"trajectories", "teachers' answers"}
    assert parts["teachers' answers"] == pictures * 3 * latent * 4
    conditioning = (parts["trajectories"] / 4 - pictures * 9 * latent) / (pictures + items)
    assert conditioning == int(conditioning) >= prompt


def test_rewards_and_whole_paths_count() -> None:
    config, algorithm = demo()
    algorithm.needs_rewards = True
    parts = round_bytes(config, algorithm, 3)
    assert parts["pictures"] == 72 * 3 * 32 * 32 * 4
    assert parts["trajectories"] > round_bytes(*demo(), 3)["trajectories"]


@pytest.mark.parametrize(("capacity", "fits"), [(100, 7), (28, 1), (15, 1)])
def test_as_many_rounds_as_fit_into_the_part(capacity, fits) -> None:
    assert rounds_that_fit({"trajectories": 10 * MB}, capacity * MB, 0.7) == fits


def test_a_round_that_does_not_fit_is_refused_with_the_sum() -> None:
    with pytest.raises(PlacementError) as caught:
        rounds_that_fit({"trajectories": 10 * MB, "pictures": 5 * MB}, 20 * MB, 0.7)
    text = str(caught.value)
    assert "a round needs 15.0 MB" in text and "trajectories 10.0 + pictures 5.0" in text and "is 14.0 MB" in text


def test_it_is_refused_before_ray_starts(monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config, algorithm = demo("batch.images_per_task=60000", "batch.item_size=600", "cluster.object_store_mb=80")
    with pytest.raises(PlacementError, match=r"a round needs .* MB of object store"):
        preflight(config, algorithm)


def test_a_family_that_does_not_say_its_shape_is_not_bounded() -> None:
    assert rounds_that_fit({}, 1, 0.7) is None


def test_full_weights_count_once_a_round_and_once_more() -> None:
    """A round is drawn with a version of its own, and the next one is published before the last is let go."""
    config, algorithm = demo("student.lora=null")
    parts = round_bytes(config, algorithm, 3)
    whole = family_class("sd3").skeleton(config.model).state_dict()
    assert parts["weights"] == sum(tensor.nbytes for tensor in whole.values())
    sizes = {"trajectories": 10 * MB, "weights": 20 * MB}
    assert [rounds_that_fit(sizes, capacity * MB, 1.0) for capacity in (50, 79, 80)] == [1, 1, 2]
    with pytest.raises(PlacementError, match=r"needs 50.0 MB .*weights 20.0; the version after it 20.0.* is 49.0 MB"):
        rounds_that_fit(sizes, 49 * MB, 1.0)
