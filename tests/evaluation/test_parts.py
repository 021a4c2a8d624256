"""The folder of an evaluation: parts that are there, parts that failed, and folders that are something else."""

import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from opd_ray.errors import RunFolderError
from opd_ray.evaluation.parts import Part, Results, score_of
from opd_ray.types import Prompt, Scored

KNOWN = {"sample": 0, "seed": 0, "steps": 4, "guidance": 1.0, "file": None}
PARTS = [Part(f"part{n}", "m", (Prompt(f"{n}", f"p{n}", "t", {"n": n}),), (KNOWN,), "sample", ()) for n in range(3)]
GOOD = Scored({"r": [0.5]}, {})


def test_parts_that_are_there_are_not_done_again_but_those_that_failed(tmp_path):
    first = Results(tmp_path, ["r"], {"seed": 0})
    assert first.left(PARTS) == PARTS
    first.write(PARTS[0], GOOD)
    first.write(PARTS[1], Scored({"r": [math.nan]}, {"r": {0: "OSError: gone"}}))
    again = Results(tmp_path, ["r"], {"seed": 0})
    assert again.left(PARTS) == PARTS[1:]
    for part in PARTS[1:]:
        again.write(part, GOOD)
    rows = again.finish(PARTS)
    assert pq.read_table(tmp_path / "images.parquet").to_pylist() == rows and not (tmp_path / "parts").exists()
    assert [(row["part"], row["metadata"], row["score_r"]) for row in rows] == [
        (f"part{n}", f'{{"n": {n}}}', 0.5) for n in range(3)
    ]
    assert Results(tmp_path, ["r"], {"seed": 0}).left(PARTS) == []


def test_other_pictures_of_the_same_name_do_not_count(tmp_path):
    """For instance where a file of a folder could not be read then, and can now: its pictures are cut otherwise."""
    results = Results(tmp_path, ["r"], {})
    results.write(PARTS[0], GOOD)
    assert results.left([PARTS[0]]) == []
    for other in (replace(PARTS[0], rows=(KNOWN | {"file": "b.png"},)), replace(PARTS[1], name=PARTS[0].name)):
        assert results.left([other]) == [other]


def test_a_kill_at_the_end_doubles_no_row_and_brings_no_failure_back(tmp_path, monkeypatch):
    """The table of an earlier time, whose middle part failed; then the parts of this time, killed in `finish`."""
    first = Results(tmp_path, ["r"], {})
    for part, found in zip(PARTS, (GOOD, Scored({"r": [math.nan]}, {"r": {0: "OSError: gone"}}), GOOD), strict=True):
        first.write(part, found)
    first.finish(PARTS)
    again = Results(tmp_path, ["r"], {})
    assert again.left(PARTS) == [PARTS[1]]
    again.write(PARTS[1], GOOD)
    for done in (lambda: None, lambda: again.finish(PARTS)):  # before the table is written, and between it and the end
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", lambda path: None)
            done()
        after = Results(tmp_path, ["r"], {})
        assert after.left(PARTS) == []
        assert [(name, len(rows)) for name, rows in after.rows.items()] == [(part.name, 1) for part in PARTS]
    (tmp_path / "parts" / ".nfs0001").touch()  # whatever else lies there
    assert len(after.finish(PARTS)) == 3 and not (tmp_path / "parts").exists()


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_what_is_no_number_is_no_score(tmp_path, score):
    (row,) = PARTS[0].table(Scored({"r": [score]}, {}))
    assert row["score_r"] is None and row["error_r"] is None and math.isnan(score_of(row, "r"))
    (row,) = PARTS[0].table(Scored({"r": [1.0]}, {"r": {0: "it failed"}}))
    assert row["score_r"] is None and row["error_r"] == "it failed"


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "one").mkdir()
    Results(tmp_path / "one", ["r"], {"seed": 0, "models": {"a": 1}})
    with pytest.raises(RunFolderError, match=r"holds another evaluation: seed was 0, now 1\. Choose another --out"):
        Results(tmp_path / "one", ["r"], {"seed": 1, "models": {"a": 1}})
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="is not empty and holds no evaluation"):
        Results(tmp_path / "two", ["r"], {})
    (tmp_path / "one" / "parts" / "part0.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunFolderError, match=r"part0\.parquet: cannot be read \(.*\); remove it"):
        Results(tmp_path / "one", ["r"], {"seed": 0, "models": {"a": 1}})
