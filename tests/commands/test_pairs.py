"""``opd-ray pairs``: preferences of a reward between pictures of a model, or of a file."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from opd_ray.commands import pairs as command
from opd_ray.config import PairsConfig
from opd_ray.pairs.feedback import drawn_pairs
from opd_ray.pairs.index import COLUMNS, index_pairs
from tests.commands.conftest import BRIGHT
from tests.pairs import files

GREEN = "tests.commands.scoring:greenness"


def about(path):
    return json.loads(pq.read_schema(path).metadata[b"opd_ray"])


def test_the_best_is_paired_with_the_worst_and_ties_are_left_out():
    images = torch.arange(3 * 3).view(3, 3, 1, 1, 1).expand(3, 3, 3, 8, 8) / 9
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.2, 0.2], [0.1, torch.nan, 0.3]])
    table, counts = drawn_pairs(images, ["a", "b", "c"], scores, [0, 1, 2])
    assert counts == {"pairs": 1, "ties": 1, "unscored": 1}
    (row,) = table.to_pylist()
    assert {row["label_0"], row["label_1"]} == {0.0, 1.0} and row["caption"] == "a"
    better = int(row["label_1"])
    assert (row[f"score_{better}"], row[f"score_{1 - better}"]) == pytest.approx((0.9, 0.1))


def test_drawn_pairs_can_be_trained_on_and_say_where_they_come_from(cli, tiny, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("red cat\ntwo dogs\nblue car\n")
    out = tmp_path / "pairs.parquet"
    asked = (str(tiny), "--prompts", prompts, "--reward", BRIGHT, "--pairs", 5, "--steps", 2, "--out", out)
    done = cli("pairs", *asked)
    assert done.code == 0, done.err
    assert done.out.startswith(f"5 pairs in {out}")
    assert about(out)["reward"] == BRIGHT and about(out)["model"] == str(tiny) and about(out)["versions"]["torch"]
    table = pq.read_table(out)
    assert set(COLUMNS) < set(table.column_names) and index_pairs(PairsConfig(files=str(out))).pairs == 5
    for row in table.to_pylist():
        assert (row["score_0"] > row["score_1"]) == (row["label_0"] == 1)
    assert cli("pairs", *asked).error.endswith("is there already; choose another name or remove it")


def test_whoever_is_stopped_goes_on_and_gets_the_same_file(cli, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PART", 2)
    prompts = tmp_path / "p.txt"
    prompts.write_text("red cat\ntwo dogs\nblue car\n")

    def asked(name, count=5):
        more = ("--pairs", count, "--steps", 2, "--images-per-prompt", 3, "--out", tmp_path / name)
        return cli("pairs", str(tiny), "--prompts", prompts, "--reward", BRIGHT, *more)

    assert asked("whole.parquet").code == 0
    with monkeypatch.context() as patch:
        drawn = command._drawn

        def stopping(*args):
            for number, part in enumerate(drawn(*args)):
                if number == 1:
                    raise KeyboardInterrupt
                yield part

        patch.setattr(command, "_drawn", stopping)
        with pytest.raises((KeyboardInterrupt, SystemExit, AssertionError)):
            assert asked("parts.parquet").code == 0
    assert not (tmp_path / "parts.parquet").exists()
    assert "was begun with another pairs; go on as it was" in asked("parts.parquet", 4).error
    assert asked("parts.parquet").code == 0
    assert pq.read_table(tmp_path / "parts.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not (tmp_path / "parts.parquet.parts").exists()


def test_another_files_pairs_get_a_rewards_labels(cli, tmp_path):
    """Winner and loser of a row are as green as one another, so a third colour is mixed into one of them."""
    source = files.parquet(tmp_path / "a.parquet", 7, broken={4: b"", 2: files.noisy()})
    done = cli("pairs", "--relabel", source, "--reward", GREEN, "--out", tmp_path / "b.parquet", "--json")
    assert done.code == 0, done.err
    counts = json.loads(done.out)["counts"]
    assert counts == {"pairs": 1, "ties": 5, "unscored": 0, "broken": 1}
    row = pq.read_table(tmp_path / "b.parquet").to_pylist()[2]
    assert (row["label_0"], row["label_1"]) == (1.0, 0.0) and row["score_0"] > row["score_1"]
    assert about(tmp_path / "b.parquet")["relabel"] == str(source)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--reward is missing"),
        (("world", "--reward", BRIGHT), "give MODEL and --prompts to draw pairs, or --relabel FILE"),
        (("world", "--relabel", "x", "--reward", BRIGHT), "--relabel takes its pictures from a file"),
        (("world", "--prompts", "none.txt", "--reward", BRIGHT), "none.txt: cannot be read (No such file"),
        (("--relabel", "none.parquet", "--reward", BRIGHT), "cannot be read (No such file"),
        (
            ("world", "--prompts", "world/text/train", "--reward", "tests.commands.scoring:never"),
            "no pair came of it (2",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(cli, tmp_path, args, message):
    more = ("--pairs", 2, "--steps", 1) if args and args[0] == "world" else ()
    assert message in cli("pairs", *args, *more, "--out", tmp_path / "o.parquet").error
