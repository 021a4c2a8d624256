"""The reader of pairs, and whole runs on them in one process."""

import json
from itertools import islice

import pytest
import torch

from opd_ray.actors.pairs import PairsActor
from opd_ray.algorithms import Algorithm, Forward, Loss
from opd_ray.commands.train import run_training
from opd_ray.config import PairsConfig
from opd_ray.errors import PromptError
from opd_ray.metrics import scalars
from opd_ray.pairs.index import index_pairs
from opd_ray.pairs.order import Order
from opd_ray.pairs.windows import Reading
from opd_ray.rows import told_of_pairs
from tests.algorithms.parts import load, run_config
from tests.pairs import files
from tests.runtime.runs import go


class Winners(Algorithm):
    """Fine-tunes on the winners, so that a pair's tensors reach the weights."""

    needs_rollouts = False

    def forwards(self, experience, update):
        told = experience.recorded
        cond = {name.removeprefix("cond."): one for name, one in told.items() if name.startswith("cond.")}
        noise = told["loser"]
        yield Forward(0.5 * (told["winner"] + noise), 0.5, 0.0, 0, cond, {}, {"target": noise - told["winner"]})

    def loss(self, forward, velocity):
        return Loss((velocity["student"] - forward.inputs["target"]).square().mean())


SECTIONS = {
    "algorithm": {"name": f"{__name__}:Winners"},
    "student": {"lora": {"rank": 4, "alpha": 8}, "guidance": 1.0},
    "batch": {"images_per_task": 6, "item_size": 3},
}


@pytest.fixture(scope="module")
def family(tiny):
    return load(tiny, whole=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    kinds = {"ties": {1, 6}, "empty": {3}, "broken": {4: b"", 8: files.noisy()[:-200]}}
    return files.parquet(tmp_path_factory.mktemp("pairs") / "a.parquet", 20, **kinds)


def actor_of(family, path, asked=None, **more):
    order = Order(index_pairs(PairsConfig(files=str(path))), 0, 6)

    def rows(position):
        if asked is not None:
            asked.append(position)
        return order.rows(Reading(files.SIDE), position)

    return PairsActor(family, lambda side: rows, size=3, **more)


def same(one, other):
    assert one.tensors.keys() == other.tensors.keys() and one.faults == other.faults
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_an_item_is_pictures_and_captions_encoded(family, path):
    item = actor_of(family, path).read(1)
    rows = list(islice(Order(index_pairs(PairsConfig(files=str(path))), 0, 6).rows(Reading(files.SIDE), 3), 3))
    assert item.tensors["winner"].shape == (3, *family.latent_shape)
    pictures = [
        torch.frombuffer(bytearray(data), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1).float() / 255
        for data in (*(row.winner for row in rows), *(row.loser for row in rows))
    ]
    latents = family.encode_images(torch.stack(pictures))
    assert torch.equal(torch.cat([item.tensors["winner"], item.tensors["loser"]]), latents)
    cond = family.encode([row.caption for row in rows])
    assert all(torch.equal(item.tensors[f"cond.{name}"], tensor) for name, tensor in cond.items())
    assert all(torch.equal(item.tensors[f"empty.{name}"], tensor) for name, tensor in family.empty().items())


def test_an_item_is_the_same_whatever_was_read_before(family, path):
    asked = []
    whole = [actor_of(family, path).read(number) for number in range(12)]
    first, second = actor_of(family, path, asked), actor_of(family, path)
    for number in range(0, 12, 2):  # two readers take turns
        assert same(first.read(number), whole[number]) and same(second.read(number + 1), whole[number + 1])
    assert asked == [0], "in order it streams on"
    assert same(first.read(3), whole[3]) and same(first.read(11), whole[11])
    assert asked == [0, 9]
    assert same(actor_of(family, path, ahead=0).read(7), whole[7])


def test_mirrored_pictures_are_the_same_in_any_reader_and_not_all_mirrored(family, path):
    plain, mirrored, again = actor_of(family, path), actor_of(family, path, flip=5), actor_of(family, path, flip=5)
    rows = list(islice(plain._from(0), 3))
    rows = [
        type(row)(**{f: getattr(row, f) for f in row.__slots__} | {"winner": bytes(range(256)) * 3}) for row in rows
    ]
    ours, theirs = mirrored._pictures(rows * 8, 0), again._pictures(rows * 8, 0)
    before = plain._pictures(rows * 8, 0)
    assert torch.equal(ours, theirs)
    kinds = [torch.equal(a, b) for a, b in zip(ours, before, strict=True)]
    assert all(kind or torch.equal(a, b.flip(-1)) for kind, a, b in zip(kinds, ours, before, strict=True))
    assert {torch.equal(a, b) for a, b in zip(mirrored._pictures(rows, 0), before, strict=False)} <= {True, False}


def config_of(tiny, path, **more):
    return run_config(tiny, **(SECTIONS | {"pairs": {"files": str(path), "window": 6, "max_bad": 0.5}} | more))


def test_a_run_stops_and_goes_on_bit_for_bit_and_counts_what_is_broken(tiny, path, tmp_path):
    whole = run_training(config_of(tiny, path, rounds=4), tmp_path / "whole", resume=False)
    run_training(config_of(tiny, path, rounds=2), tmp_path / "parts", resume=False)
    parts = run_training(config_of(tiny, path, rounds=4), tmp_path / "parts", resume=True)
    assert whole["student_sha256"] == parts["student_sha256"] != ""
    rows = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["pairs"]["read"] for row in rows] == [6, 6, 6, 6]
    # 24 of an epoch of 17: 17 places with both broken pairs, and 7 more.
    faults = [fault for row in rows for fault in row.get("broken_pairs", [])]
    assert sum(row["pairs"]["broken"] for row in rows) == len(faults) >= 2
    assert scalars(rows[0])["pairs/read"] == 6
    assert {fault.partition(": ")[0].rpartition("/")[2] for fault in faults} == {"a.parquet row 5", "a.parquet row 9"}


def test_a_run_tells_what_it_left_out_at_its_start_and_its_end(tiny, path, tmp_path):
    notes = go(config_of(tiny, path, rounds=3), tmp_path / "run").notes
    assert "pairs: 17 of 20 pairs; left out: 2 ties and 1 without a caption" in notes
    (end,) = [note for note in notes if "stood in" in note]
    assert "row 5: jpg_0 is missing" in end and "row 9: jpg_0 is broken (image file is truncated" in end


def test_what_is_told_at_the_end_is_short():
    rows = [{"broken_pairs": [f"row {n}: jpg_0 is missing"]} for n in (1, 2, 3, 4, 1)]
    assert told_of_pairs(rows) == (
        "pairs: 4 have broken pictures, and others of their windows stood in for them: row 1: jpg_0 is missing; "
        "row 2: jpg_0 is missing; row 3: jpg_0 is missing and 1 more in broken_pairs of metrics.jsonl"
    )
    assert told_of_pairs([{"round": 0}]) == ""


def test_files_are_refused_before_the_run_folder_is_taken(tiny, tmp_path):
    ties = files.parquet(tmp_path / "a.parquet", 3, ties={0, 1, 2})
    with pytest.raises(PromptError, match="all 3 rows are ties"):
        run_training(config_of(tiny, ties), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()
