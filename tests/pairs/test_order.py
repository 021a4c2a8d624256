"""Which pair is where: every epoch has each good pair once, from whatever point one looks."""

from collections import Counter
from functools import partial
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_ray.config import PairsConfig
from opd_ray.pairs.index import index_pairs
from opd_ray.pairs.order import Order
from opd_ray.pairs.windows import Reading
from tests.pairs import files

TIES, EMPTY, BROKEN = {1, 8, 9, 10, 11, 12}, {3, 17}, {4: b"", 19: b"no picture"}
GOOD = set(range(23)) - TIES - EMPTY - BROKEN.keys()
EPOCH = 23 - len(TIES) - len(EMPTY)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Two files, whose row groups end at 5, 10, 12 and 17, 22, 23."""
    folder = tmp_path_factory.mktemp("pairs")
    kinds = {"ties": TIES, "empty": EMPTY, "broken": BROKEN}
    files.parquet(folder / "a.parquet", 12, **kinds)
    files.parquet(folder / "b.parquet", 11, first=12, **kinds)
    return index_pairs(PairsConfig(files=str(folder)))


def rows_of(index, seed=0, window=6):
    order = Order(index, seed, window)
    return partial(order.rows, Reading(files.SIDE))


@pytest.fixture(scope="module")
def streams(index):
    """(seed, window) -> three epochs of rows, read in one go."""
    known = {}

    def stream(seed, window):
        if (seed, window) not in known:
            known[seed, window] = list(islice(rows_of(index, seed, window)(0), 3 * EPOCH))
        return known[seed, window]

    return stream


def test_what_counts_is_known_from_the_small_columns(index):
    assert (index.rows, index.pairs, index.ties, index.empty) == (23, EPOCH, len(TIES), len(EMPTY))
    assert str(index) == "15 of 23 pairs; left out: 6 ties and 2 without a caption"


@pytest.mark.parametrize("window", [1, 6, 1000])
def test_an_epoch_has_every_good_pair_in_its_own_place_once(streams, window):
    rows = streams(0, window)
    assert [row.position for row in rows] == list(range(3 * EPOCH))
    for epoch in range(3):
        part = rows[epoch * EPOCH : (epoch + 1) * EPOCH]
        own = Counter(files.row_of(row.caption) for row in part if not row.fault)
        assert own == Counter(GOOD)
        assert len([row for row in part if row.fault]) == len(BROKEN)
        assert all(files.row_of(row.caption) in GOOD for row in part), "whoever stands in is whole"
    orders = [[row.caption for row in rows[n * EPOCH : (n + 1) * EPOCH]] for n in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert streams(0, window) != streams(1, window)


@given(position=st.integers(0, 3 * EPOCH - 1), seed=st.integers(0, 1), window=st.sampled_from([1, 6, 1000]))
def test_from_any_position_on_it_is_the_same(index, streams, position, seed, window):
    again = list(islice(rows_of(index, seed, window)(position), 4))
    assert again == streams(seed, window)[position : position + 4][: len(again)] + again[3 * EPOCH - position :]


def test_winners_are_those_that_the_labels_say(streams):
    for row in streams(0, 6):
        assert files.is_winner(row.winner) and not files.is_winner(row.loser)


def test_a_pair_whose_window_has_another_one_stands_in_without_moving_the_rest(tmp_path):
    """The same file with and without a broken picture: all other places are as they were."""
    stream = {}
    for name, broken in (("whole", {}), ("broken", {4: b""})):
        path = files.parquet(tmp_path / f"{name}.parquet", 10, broken=broken)
        order = Order(index_pairs(PairsConfig(files=str(path))), 0, 5)
        stream[name] = list(islice(order.rows(Reading(files.SIDE), 0), 10))
    changed = [n for n in range(10) if stream["whole"][n].caption != stream["broken"][n].caption]
    assert [stream["whole"][n].caption for n in changed] == ["caption 4"]
    assert stream["broken"][changed[0]].fault.endswith("broken.parquet row 5: jpg_0 is missing")
