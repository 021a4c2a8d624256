"""One line for each way in which files of pairs can be wrong."""

import io
import json
import os
import re
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opd_ray.config import PairsConfig
from opd_ray.errors import PromptError
from opd_ray.pairs.index import index_pairs
from opd_ray.pairs.order import Order
from opd_ray.pairs.pictures import BadPicture, prepared
from opd_ray.pairs.windows import Reading, _content
from tests.pairs import files


def refused(path, **more):
    with pytest.raises(PromptError) as caught:
        index_pairs(PairsConfig(files=str(path), **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_column_is_named_with_what_is_there(tmp_path):
    pq.write_table(files.table(3).drop_columns(["label_1", "jpg_0"]), tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").endswith(
        "a.parquet: has no column jpg_0, label_1; it has jpg_1, label_0, caption"
    )


def test_what_is_no_parquet_or_not_there(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    assert "a.parquet: is no Parquet file (" in refused(tmp_path / "a.parquet")
    assert "b.parquet: cannot be read (" in refused(tmp_path / "b.parquet")
    assert "expected .parquet, .jsonl or a folder" in refused(tmp_path / "c.csv")
    (tmp_path / "d").mkdir()
    assert "expected pairs.jsonl or .parquet files in it, found nothing" in refused(tmp_path / "d")


def test_no_rows_all_ties_and_no_captions(tmp_path):
    assert refused(files.parquet(tmp_path / "a.parquet", 0)).endswith("has no rows; expected at least one pair")
    ties = files.parquet(tmp_path / "b.parquet", 3, ties={0, 1, 2})
    assert "all 3 rows are ties" in refused(ties)
    empty = files.parquet(tmp_path / "c.parquet", 3, empty={0, 1, 2})
    assert "none of 3 rows is left: 0 ties, 3 without a caption" in refused(empty)
    assert "c.parquet: row 1 has no caption; mend it, or set pairs.on_bad: skip" in refused(empty, on_bad="stop")


def test_labels_that_are_no_numbers(tmp_path):
    table = files.table(2)
    table = table.set_column(2, "label_0", [["first", "second"]])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "has column label_0 of type string, expected a number" in refused(tmp_path / "a.parquet")


def test_rows_of_a_jsonl_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x", "winner": "a.jpg"}\n')
    assert refused(path).endswith("line 1 has no loser as text; it has prompt, winner")
    path.write_text("\n{\n")
    assert "line 2 is not JSON" in refused(path)


def test_a_folder_of_pictures_is_read_and_what_is_missing_is_named(tmp_path):
    folder = files.jsonl(tmp_path / "set", 600, empty={2}, missing={7})
    index = index_pairs(PairsConfig(files=str(folder)))
    assert (index.pairs, index.empty, len(index.shards)) == (599, 1, 3)
    rows = list(islice(Order(index, 0, 100).rows(Reading(files.SIDE), 0), 599))
    (stand_in,) = [row for row in rows if row.fault]
    assert re.search(r"pairs.jsonl row 8: winner 7w.jpg is missing$", stand_in.fault)
    assert {files.row_of(row.caption) for row in rows} == set(range(600)) - {2, 7}
    assert all(files.is_winner(row.winner) and not files.is_winner(row.loser) for row in rows)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "is missing"),
        (b"", "is missing"),
        (b"GIF89a and more", "is no JPEG, PNG, WEBP; its 15 bytes begin with 47494638"),
        (files.noisy()[:-200], "is broken (image file is truncated"),
        (files.jpeg(0, winner=True)[:300], "is broken (Truncated File Read)"),
        (b"\xff\xd8\xff\xe0 and then nothing", "is "),
    ],
)
def test_a_picture_that_cannot_be_read(data, reason):
    with pytest.raises(BadPicture) as caught:
        prepared(data, 16)
    assert str(caught.value).startswith(reason)


def test_a_picture_is_resized_by_its_shorter_side_and_cropped_in_the_middle():
    import io

    from PIL import Image

    # 40 x 20: columns 0..9 black, 10..29 white, 30..39 black. Half the size is 20 x 10, whose middle is all white.
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = prepared(file.getvalue(), 10)
    assert found.shape == (10, 10, 3) and (found[:, 1:-1] == 255).all()
    assert (prepared(file.getvalue(), 20) == 255).all(), "without resizing the crop alone"


@pytest.mark.parametrize(
    ("reading", "reason"),
    [
        (Reading(16, on_bad="stop"), "jpg_0 is missing; mend it, or set pairs.on_bad: skip"),
        (
            Reading(16, max_bad=0.2),
            "2 of 5 pairs that are read together are broken, more than pairs.max_bad 0.2 allows",
        ),
        (Reading(16), "and so is every other pair of its window; mend the file"),
    ],
)
def test_too_many_broken_pictures_end_the_run(tmp_path, reading, reason):
    broken = dict.fromkeys(range(5) if reading.max_bad == 1 else (0, 3), b"")
    path = files.parquet(tmp_path / "a.parquet", 5, broken=broken)
    order = Order(index_pairs(PairsConfig(files=str(path))), 3, 5)
    with pytest.raises(PromptError) as caught:
        list(islice(order.rows(reading, 0), 5))
    assert reason in str(caught.value)


def test_a_file_that_changed_meanwhile(tmp_path):
    path = files.parquet(tmp_path / "a.parquet", 5)
    order = Order(index_pairs(PairsConfig(files=str(path))), 0, 5)
    files.parquet(path, 4)
    with pytest.raises(PromptError, match=r"a.parquet has changed since the run looked at it"):
        next(order.rows(Reading(16), 0))
    path.unlink()
    with pytest.raises(PromptError, match="row 1 cannot be read"):
        next(order.rows(Reading(16), 0))


def test_the_digest_names_which_rows_count(tmp_path):
    one = index_pairs(PairsConfig(files=str(files.parquet(tmp_path / "a.parquet", 5))))
    (tmp_path / "moved").mkdir()
    moved = index_pairs(PairsConfig(files=str(files.parquet(tmp_path / "moved" / "a.parquet", 5))))
    other = index_pairs(PairsConfig(files=str(files.parquet(tmp_path / "a.parquet", 5, ties={2}))))
    assert one.digest() == moved.digest() != other.digest()
    assert json.dumps(one.digest())


def test_a_picture_that_is_a_line_is_no_picture():
    """Brought to the model's size along its shorter side it would take all memory."""
    file = io.BytesIO()
    Image.new("RGB", (6000, 2)).save(file, "JPEG")
    with pytest.raises(BadPicture, match="is 6000 x 2, longer than 16 times its other side"):
        prepared(file.getvalue(), 16)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("jpg_0", [{"bytes": b"x", "path": None}], "has column jpg_0 of type struct.*expected binary"),
        ("jpg_1", ["text"], "has column jpg_1 of type string, expected binary"),
        ("label_0", ["1"], "has column label_0 of type string, expected a number"),
    ],
)
def test_a_column_of_another_kind_is_named(tmp_path, column, values, message):
    whole = files.table(1)
    place = whole.column_names.index(column)
    pq.write_table(whole.set_column(place, column, pa.array(values)), tmp_path / "a.parquet")
    with pytest.raises(PromptError, match=message):
        index_pairs(PairsConfig(files=str(tmp_path / "a.parquet")))


def test_a_path_that_is_no_file_is_a_missing_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert [_content(tmp_path / name) for name in ("pipe", "none", "a\0b", ".")] == [None] * 4
