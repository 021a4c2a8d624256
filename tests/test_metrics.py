"""metrics.jsonl: complete rows only, finite numbers only, and a resumed run has no row twice."""

import pytest

from opd_ray.errors import RunFolderError
from opd_ray.metrics import MetricsLog, rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_rows_come_back_in_order_and_exactly(path):
    log = MetricsLog(path)
    written = [
        {"round": 0, "loss": 0.1 + 0.2, "scores": {"ocr": [1, 2.5]}, "note": "é\u2028x"},
        {"round": 1},
    ]
    for row in written:
        log.append(row)
        assert path.read_bytes().endswith(b"}\n")  # on disk at once
    assert list(rows(path)) == written
    assert len(path.read_bytes().splitlines()) == 2


def test_no_file_has_no_rows(path):
    assert list(rows(path)) == []


def test_a_torn_last_line_is_ignored_and_the_next_row_does_not_run_into_it(path):
    MetricsLog(path).append({"round": 0})
    for torn in (b'{"round": 1, "lo', b'{"round": 1}', b"\xff"):
        with path.open("ab") as file:
            file.write(torn)
        assert list(rows(path)) == [{"round": 0}]
        MetricsLog(path)
        assert path.read_bytes() == b'{"round": 0}\n'
    path.write_bytes(b'{"rou')
    MetricsLog(path).append({"round": 0})
    assert list(rows(path)) == [{"round": 0}]


@pytest.mark.parametrize("line", [b"{\n", b"\n", b"3\n", b"\xff\n"])
def test_a_broken_line_that_is_not_the_last_is_named(path, line):
    path.write_bytes(b'{"round": 0}\n' + line + b'{"round": 1}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
        list(rows(path))


def test_resuming_drops_the_rounds_that_come_again(path):
    log = MetricsLog(path)
    for row in (
        {"event": "start"},
        {"round": 0},
        {"round": 2},
        {"round": 1, "again": 1},
        {"round": 3},
    ):
        log.append(row)
    log.truncate_from(2)
    log.append({"round": 2, "new": True})
    assert list(rows(path)) == [
        {"event": "start"},
        {"round": 0},
        {"round": 1, "again": 1},
        {"round": 2, "new": True},
    ]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncating_nothing_is_fine(path):
    MetricsLog(path).truncate_from(0)
    assert list(rows(path)) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_name(path, bad):
    log = MetricsLog(path)
    for row, name in (({"loss": bad}, "loss"), ({"a": {"b": [1, bad]}}, r"a\.b\[1\]")):
        with pytest.raises(ValueError, match=rf"metric {name} is {bad}, expected a finite number"):
            log.append({"round": 0, **row})
    assert list(rows(path)) == []
    log.append({"a": {"b": [1, bad]}, "loss": bad}, null=True)
    assert list(rows(path)) == [{"a": {"b": [1, None]}, "loss": None}]
