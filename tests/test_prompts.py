"""Prompt files in every format, mistakes named with file and row; and the order of a run."""

import csv
import hashlib
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
        ("p.csv", b'prompt,task\n"a,t\n', "line 2 begins a row with a quote that is never closed"),
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


GENEVAL = (
    '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [], "prompt": "a photo of two cats"}\n'
    '{"tag": "colors", "include": "[{\\"class\\": \\"cat\\"}]", "exclude": null, "prompt": "a photo of a red cat"}\n'
)


def test_the_other_columns_of_a_row_are_metadata(tmp_path):
    (tmp_path / "geneval.jsonl").write_text(GENEVAL)
    two, red = read_prompts({"geneval": str(tmp_path / "geneval.jsonl")}, "x")["geneval"]
    assert two.metadata == {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": []}
    assert red.metadata == {"tag": "colors", "include": '[{"class": "cat"}]'}  # text stays text, and null is nothing
    assert two == Prompt(two.id, two.text, "geneval") and hash(two) == hash(Prompt(two.id, two.text, "geneval"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_metadata_of_other_formats_without_pictures(tmp_path, kind):
    row = {"caption": "a", "task": "t", "tag": "colors", "note": None, "weight": 2.0}
    file = write(tmp_path / f"p.{kind}", [row | ({"jpg_0": b"\xff\xd8"} if kind == "parquet" else {})])
    (prompt,) = read_prompts(file, "x")["t"]
    assert prompt.metadata == {"tag": "colors"} | ({"note": ""} if kind == "csv" else {})
    assert prompt.weight == 2


def test_digests_are_those_of_id_and_text_where_there_is_no_more():
    def digest(**more):
        return PromptStream({"t": [Prompt("i", "a cat", "t", **more)]}, 0).digests()["t"]

    assert digest() == hashlib.sha256(b'[["i", "a cat"]]').hexdigest()  # that of runs before there was more
    others = [digest(metadata={"n": 1}), digest(metadata={"n": 2}), digest(weight=2.0)]
    assert len({digest(), *others}) == 4
    assert digest(metadata={"n": 1, "m": 2}) == digest(metadata={"m": 2, "n": 1})


MALFORMED = """{"prompt": "a", "task": "t"}
{"prompt"
{"prompt": "a", "task": "t", "id": 1}
{"prompt": "b", "task": "t", "id": 1}
[]
{"prompt": "c", "task": "t", "weight": -1}
{"prompt": "d"}
{"text": ""}
{"prompt": "e", "task": "t"}
{}
"""
WHERE = "line 2 is not JSON (Expecting ':' delimiter: line 1 column 10 (char 9)); also line 4, line 5, line 6, line 7"


def test_malformed_rows_are_refused_together(tmp_path):
    (tmp_path / "p.jsonl").write_text(MALFORMED)
    assert refused(tmp_path / "p.jsonl") == f"{WHERE}, line 8 and 1 more"


def test_malformed_rows_are_left_out_counted_and_told_where_asked(tmp_path):
    notes, file = [], tmp_path / "p.jsonl"
    file.write_text(MALFORMED)
    prompts = read_prompts(str(file), "prompts.train", on_bad="skip", note=notes.append)
    assert [p.text for p in prompts["t"]] == ["a", "a", "e"]
    assert notes == [f"prompts.train: {file}: 7 malformed rows are left out: {WHERE}, line 8 and 1 more"]


def test_a_file_of_malformed_rows_alone_is_refused_even_so(tmp_path):
    (tmp_path / "p.jsonl").write_text("[]\n")
    with pytest.raises(PromptError, match="has no prompts; expected at least one: line 1 is a JSON list"):
        read_prompts(str(tmp_path / "p.jsonl"), "x", on_bad="skip")


def test_a_csv_goes_on_behind_a_malformed_row(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,task\na "b"c,t\n"d"e,t\nf,t,\n"g,\nh",t\n')
    notes = []
    found = read_prompts(str(tmp_path / "p.csv"), "x", on_bad="skip", note=notes.append)["t"]
    assert [p.text for p in found] == ['a "b"c', "g,\nh"]
    assert "2 malformed rows" in notes[0] and "line 3 is not CSV" in notes[0] and "also line 4" in notes[0]


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_quote_that_is_never_closed_ends_it_since_what_is_lost_cannot_be_counted(tmp_path, on_bad):
    (tmp_path / "p.csv").write_text('prompt,task\n"a,\nb",t\n\n"c,t\nd,t\n"",t\n')
    expected = "line 5 begins a row with a quote that is never closed; close it, since nothing from there"
    with pytest.raises(PromptError, match=f"{expected} to line 7 can be read$"):
        read_prompts(str(tmp_path / "p.csv"), "x", on_bad=on_bad)


def test_a_quote_that_is_closed_by_another_row_is_told_with_all_the_lines_between(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,task\na,t\n"b,t\nc,t\n"d",t\ne,t\n')
    notes = []
    found = read_prompts(str(tmp_path / "p.csv"), "x", on_bad="skip", note=notes.append)["t"]
    assert [p.text for p in found] == ["a", "e"]
    assert "1 malformed rows are left out: lines 3 to 5 are not CSV" in notes[0]


def test_repeated_texts_are_left_out_where_asked(tmp_path):
    rows = [("a", "t", None), ("a", "u", None), ("a", "t", "1"), ("b", "t", "2"), ("b", "t", None), ("a", "t", None)]
    lines = [json.dumps({"prompt": text, "task": task, "id": own}) for text, task, own in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    notes, file = [], str(tmp_path / "p.jsonl")
    all_of_them = read_prompts(file, "x")
    assert [p.id[-2:] for p in all_of_them["t"]].count("-2") == 1 and len(all_of_them["t"]) == 5
    once = read_prompts(file, "x", deduplicate=True, note=notes.append)
    assert [p.text for p in once["t"]] == ["a", "b"] and [p.text for p in once["u"]] == ["a"]
    assert once["t"][0] == all_of_them["t"][0] and once["t"][1].id == "t/2"
    assert notes == ["x: 3 rows are left out, since they repeat a text of their task"]


@pytest.mark.parametrize("weight", ["0", "-1", "NaN", "true", '"much"', "1001", "[1]", "Infinity"])
def test_a_weight_is_a_number_above_zero(tmp_path, weight):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a", "task": "t", "weight": {weight}}}')
    assert refused(tmp_path / "p.jsonl").startswith("line 1: weight is ")


def test_an_epoch_takes_a_prompt_as_often_as_its_weight_says():
    prompts = {"t": [Prompt(name, name, "t", weight=weight) for name, weight in [("a", 1), ("b", 3), ("c", 2)]]}
    one = PromptStream(prompts, 0)
    for epoch in range(3):
        taken = [p.text for p in one.take("t", 6 * epoch, 6)[0]]
        assert sorted(taken) == ["a", "b", "b", "b", "c", "c"]
    assert one.take("t", 0, 6) != one.take("t", 6, 6)
    assert sorted(p.text for p in PromptStream(prompts, 0, weighted=False).take("t", 3, 3)[0]) == ["a", "b", "c"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.7, 3.0]), min_size=1, max_size=8), st.lists(st.integers(0, 30)))
def test_weights_that_are_no_whole_numbers_hold_over_epochs_and_takes_follow_one_order(weights, counts):
    prompts = {"t": [Prompt(str(n), str(n), "t", weight=weight) for n, weight in enumerate(weights)]}
    whole, _ = PromptStream(prompts, 0).take("t", 0, 400)
    taken, cursor = [], 0
    for count in counts:
        part, cursor = PromptStream(prompts, 0).take("t", cursor, count)
        taken += part
    assert tuple(taken) == PromptStream(prompts, 0).take("t", 0, cursor)[0]
    for prompt in prompts["t"]:
        # After e whole epochs weight * e times, but for one; an epoch that is begun adds at most one epoch's share.
        expected = prompt.weight * 400 / sum(weights)
        assert abs(whole.count(prompt) - expected) <= 2 * prompt.weight + 2


def test_prompts_of_one_broken_weight_take_turns():
    prompts = {"t": [Prompt(str(n), str(n), "t", weight=0.5) for n in range(100)]}
    first, second = (set(PromptStream(prompts, 0).take("t", start, 45)[0]) for start in (0, 55))
    assert len(first) == 45 and len(second) == 45 and not first & second  # half of them in each epoch


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
