"""Prompt files in every format, mistakes named with file and row; and the order of a run."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_ray.errors import PromptError
from opd_ray.prompts import PromptStream, read_prompts
from opd_ray.types import Prompt

ROWS = [
    {"prompt": 'a sign that says "x, y"', "task": "text", "id": "s1"},
    {"prompt": "two cats\u2028one line", "task": "count", "id": "7"},
    {"prompt": "drei Bäume", "task": "count", "id": "8"},
]


def write(path, rows=ROWS):
    """The same rows in the format of the path's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, kind):
    prompts = read_prompts(write(tmp_path / f"p.{kind}"), "prompts.train")
    assert prompts == {
        "text": (Prompt("text/s1", ROWS[0]["prompt"], "text"),),
        "count": (Prompt("count/7", ROWS[1]["prompt"], "count"), Prompt("count/8", "drei Bäume", "count")),
    }


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_text_may_have_three_names(tmp_path, kind, column):
    file = write(tmp_path / f"p.{kind}", [{column: "a cat", "task": "t", "other": 1}])
    assert [p.text for p in read_prompts(file, "x")["t"]] == ["a cat"]


def test_prompt_goes_before_text_and_caption(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"caption": "c", "text": "b", "prompt": "a", "task": "t"}])
    assert read_prompts(file, "x")["t"][0].text == "a"


def test_a_file_for_each_task(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \r\nthree", encoding="utf-8")
    other = write(tmp_path / "b.jsonl", [{"prompt": "four"}, {"prompt": "five", "task": "b", "id": 3}])
    prompts = read_prompts({"a": str(tmp_path / "a.txt"), "b": other}, "x")
    assert [p.text for p in prompts["a"]] == ["one", "two", "three"]
    assert [(p.text, p.task) for p in prompts["b"]] == [("four", "b"), ("five", "b")]
    assert prompts["b"][1].id == "b/3"


def test_ids_come_from_task_and_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\nx\nx\n")
    (tmp_path / "b.txt").write_text("y\nx\n")
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    first = read_prompts({"t": a}, "x")["t"]
    assert len({p.id for p in first}) == 4
    assert first[2].id == f"{first[0].id}-2" and first[3].id == f"{first[0].id}-3"
    assert {p.id for p in read_prompts({"t": b}, "x")["t"]} == {first[0].id, first[1].id}
    assert {p.id for p in read_prompts({"u": b}, "x")["u"]}.isdisjoint(p.id for p in first)
    assert first[0].id == "cf8028329ec9"  # stays the same in later releases: it names the noise


def refused(file, spec=None):
    with pytest.raises(PromptError) as caught:
        read_prompts(str(file) if spec is None else spec, "prompts.train")
    message = str(caught.value)
    assert message.startswith(f"prompts.train: {file}: ") and "\n" not in message
    return message.removeprefix(f"prompts.train: {file}: ")


COLUMN = "expected a column prompt or text or caption"
TWICE = b'{"prompt": "a", "task": "t", "id": 1}\n{"prompt": "b", "task": "t", "id": "1"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}', "line 1 has no task; add a column task"),
        ("p.jsonl", b'{"prompt": "a", "task": " "}', "line 1 has no task"),
        ("p.jsonl", b'\n{"task": "t", "tag": 1}', f"line 2 has no prompt; {COLUMN}, found task,"),
        ("p.jsonl", b'{"prompt": " ", "task": "t"}', "line 1 has an empty prompt"),
        ("p.jsonl", b'{"prompt": null, "task": "t"}', "line 1 has an empty prompt"),
        ("p.jsonl", b'{"prompt": ["a"], "task": "t"}', "line 1: prompt is of type list"),
        ("p.jsonl", b'{"prompt": "a", "task": 3}', "line 1: task is of type int, expected text"),
        ("p.jsonl", b'{"prompt": "a", "task": "t", "id": true}', "line 1: id is of type bool"),
        ("p.jsonl", b'{"prompt": "\\ud800", "task": "t"}', "line 1: prompt is not valid Unicode"),
        ("p.jsonl", TWICE, "line 2 has id '1', but task 't' has it already"),
        ("p.jsonl", b'{"prompt": "a", "task": "t"}\n{"prompt', "line 2 is not JSON"),
        ("p.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("p.jsonl", b'"a"', "line 1 is a JSON str, expected an object"),
        ("p.jsonl", b"\n", "has no prompts"),
        ("p.jsonl", b'{"prompt": "a", "task": "t"}\n\xff', "line 2 is not UTF-8"),
        ("p.txt", b"a cat", "line 1 has no task; add a column task, or give one file for each"),
        ("p.txt", b"", "has no prompts"),
        ("p.txt", "Bäume".encode("latin-1"), "line 1 is not UTF-8"),
        ("p.csv", b"", "has no prompts"),
        ("p.csv", b"prompt,task\n", "has no prompts"),
        ("p.csv", b"prompt,task\na,t\nb\n", "line 3 has no task"),
        ("p.csv", b"prompt,task\na, b,t\n", "line 2 has more cells than the header"),
        ("p.csv", b'prompt,task\n"a,t\n', "line 2 is not CSV"),
        ("p.csv", b"a cat\na dog\n", f"line 2 has no prompt; {COLUMN}, found a cat"),
        ("p.parquet", b"PAR1", "is not parquet"),
        ("p.parquet", b"", "is not parquet"),
        ("p.yaml", b"", "unknown kind of file '.yaml'; expected one of .txt, .csv, "),
        ("p", b"", "unknown kind of file ''"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_with_file_and_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(message)


def test_files_that_cannot_be_read_are_named(tmp_path):
    assert refused(tmp_path / "no.txt") == "cannot be read (No such file or directory)"
    (tmp_path / "folder.csv").mkdir()
    assert refused(tmp_path / "folder.csv") == "cannot be read (Is a directory)"


def test_a_row_of_another_task_than_its_file_is_refused(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "a", "task": "t"}])
    message = refused(Path(file), {"u": file})
    assert message == "line 1 is of task 't', but the file is given for 'u'"


def test_parquet_rows_are_counted(tmp_path):
    file = write(tmp_path / "p.parquet", [{"prompt": "a", "task": "t"}, {"prompt": None, "task": "t"}])
    assert refused(Path(file)).startswith("row 2 has an empty prompt")


def test_a_csv_from_a_spreadsheet_and_spaces_in_its_header(tmp_path):
    (tmp_path / "p.csv").write_bytes(b'\xef\xbb\xbfprompt, task\r\n"two\r\nlines",t\r\n')
    assert [p.text for p in read_prompts(str(tmp_path / "p.csv"), "x")["t"]] == ["two\r\nlines"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["txt", "csv", "jsonl", "parquet"]), st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path, content, kind, mapped):
    path = tmp_path / f"p.{kind}"
    path.write_bytes(b"prompt,task\n" * (kind == "csv") + content)
    try:
        prompts = read_prompts({"t": str(path)} if mapped else str(path), "x")
    except PromptError as error:
        assert "\n" not in str(error)
    else:
        assert all(prompts.values())


def stream(count=7, seed=0, task="t"):
    return PromptStream({task: [Prompt(str(i), f"p{i}", task) for i in range(count)]}, seed)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 20), max_size=6))
def test_takes_of_any_sizes_follow_one_order_and_epochs_hold_every_prompt_once(length, counts):
    prompts = stream(length)
    taken, cursor = [], 0
    for count in counts:
        part, cursor = stream(length).take("t", cursor, count)  # a new stream: no hidden state
        taken += part
    assert cursor == sum(counts) == len(taken)
    assert tuple(taken) == prompts.take("t", 0, cursor)[0]
    for start in range(0, cursor - length + 1, length):
        assert len(set(taken[start : start + length])) == length


def test_the_order_depends_on_seed_task_and_epoch():
    def texts(prompts, task, cursor):
        return [p.text for p in prompts.take(task, cursor, 20)[0]]

    base = texts(stream(20), "t", 0)
    assert base == texts(stream(20), "t", 0)
    assert base != texts(stream(20), "t", 20)
    assert base != texts(stream(20, seed=1), "t", 0)
    assert base != texts(stream(20, task="u"), "u", 0)
    assert base != sorted(base, key=lambda text: int(text[1:]))


def test_bad_takes_are_refused():
    with pytest.raises(PromptError, match="no prompts for task 'x'; there are: t"):
        stream().take("x", 0, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        stream().take("t", -1, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        stream().take("t", 0, -1)
    with pytest.raises(PromptError, match="task 't' has no prompts"):
        PromptStream({"t": []}, 0)
