"""``opd-ray pairs``: preferences of a reward between pictures of a model, or of a file."""

import io
import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

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


@pytest.fixture
def given(tmp_path):
    """Two pictures, one of them asked for twice."""
    for name, color in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        Image.new("RGB", (40, 32), color).save(tmp_path / f"{name}.png")
    path = tmp_path / "given.jsonl"
    rows = [{"prompt": f"a {name} thing", "image": f"{name}.png"} for name in ("red", "blue", "red")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_given_pictures_are_preferred_to_drawings_of_their_prompts(cli, tiny, given, tmp_path):
    out = tmp_path / "style.parquet"
    done = cli("pairs", tiny, "--pictures", given, "--pairs", 7, "--steps", 2, "--guidance", 1, "--out", out)
    assert "7 pairs in" in done.out
    rows = pq.read_table(out).to_pylist()
    assert [row["caption"] for row in rows] == [f"a {n} thing" for n in ("red", "blue", "red") * 2 + ("red",)]
    winners = [row["jpg_0" if row["label_0"] == 1 else "jpg_1"] for row in rows]
    colors = [Image.open(io.BytesIO(data)).resize((1, 1)).getpixel((0, 0)) for data in winners]
    assert [color[0] > 200 for color in colors] == [row["caption"] == "a red thing" for row in rows]
    losers = {row["jpg_1" if row["label_0"] == 1 else "jpg_0"] for row in rows}
    assert len(losers) == 7, "each drawing is another one"


def test_the_other_picture_may_be_of_another_prompt(cli, tiny, given, tmp_path):
    drawn = []
    for beside in ((), ("--beside", "a thing")):
        out = tmp_path / f"{len(beside)}.parquet"
        cli("pairs", tiny, "--pictures", given, *beside, "--pairs", 2, "--steps", 2, "--guidance", 1, "--out", out)
        rows = pq.read_table(out).to_pylist()
        assert [row["caption"] for row in rows] == ["a red thing", "a blue thing"]
        drawn.append([row["jpg_1" if row["label_0"] == 1 else "jpg_0"] for row in rows])
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"prompt": "x"}', "given.jsonl:1 is no row"),
        ('\n{"prompt": " ", "image": "red.png"}', "given.jsonl:2 is no row .*empty"),
        ('{"prompt": "x", "image": "green.png"}', r"given.jsonl:1: there is no .*green\.png"),
        ("{", "given.jsonl:1 is no row"),
    ],
)
def test_what_is_wrong_with_given_pictures_is_said_in_one_line(cli, tiny, given, tmp_path, content, message):
    given.write_text(content)
    assert re.search(message, cli("pairs", tiny, "--pictures", given, "--out", tmp_path / "x.parquet").error)


def test_given_pictures_need_no_judge(cli, tiny, given, tmp_path):
    told = cli("pairs", tiny, "--pictures", given, "--reward", "look", "--out", tmp_path / "x.parquet").error
    assert "--pictures needs MODEL, and none of --prompts, --reward and --relabel" in told
