"""The report page: complete, self-contained, and safe with other people's text."""

import json
import re
from html.parser import HTMLParser

import pytest

from opd_ray.errors import RunFolderError
from opd_ray.report.html import write_report
from tests.report.run_folders import ATTACK, MODELS, TASKS, metrics_row, picture, result, write_run

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags with attributes, table rows as text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "small" not in self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo")


def read(run) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


def test_the_page_is_self_contained(run):
    text, page = read(run)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(TASKS) * 2 * len(MODELS)
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not re.search(r"https?:|//\w|url\(|@import", text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [p.name for p in run.iterdir() if "tmp" in p.name] == []


def test_other_peoples_text_appears_escaped_only(run):
    text, page = read(run)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text  # a prompt, and a fact of run.json
    assert "&lt;/pre&gt;&lt;script&gt;alert(2)" in text  # the configuration
    assert ATTACK in page.text
    assert any(attrs.get("alt") == f"student: {ATTACK}" for _, attrs in page.tags)


def test_names_are_other_peoples_text_too(run):
    name = "<img src=x onerror=alert(1)>"
    data = json.loads(json.dumps(result()).replace("compose", name).replace("0.0.80", name))
    data["status"] = name
    (run / "result.json").write_text(json.dumps(data))
    row = json.loads(json.dumps(metrics_row(80)).replace("compose", name).replace("rollout", name))
    (run / "metrics.jsonl").write_text(json.dumps({**row, "scores": {name: 0.5}}))
    index = (run / "samples/index.json").read_text().replace('"task": "compose"', f'"task": "{name}"')
    (run / "samples/index.json").write_text(index)
    text, _ = read(run)
    assert "<img src=x" not in text and "&lt;img src=x" in text


def test_the_table_says_what_result_json_says(run):
    _, page = read(run)
    heads = next(row for row in page.rows if row[1:] == TASKS)
    rows = {row[0]: row[1:] for row in page.rows[page.rows.index(heads) + 1 :]}
    expected = result()
    for model, scores in expected["scores"].items():
        title = f"{model.removeprefix('teacher:')} teacher" if ":" in model else model
        assert [float(cell) for cell in rows[title]] == [scores[task]["value"] for task in TASKS]
    assert rows["gap closed"] == ["94 %", "97 %", "91 %", "–"]  # noqa: RUF001
    own = [attrs["title"] for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "own"]
    assert own == ["0.871", "0.914", "0.893"]
    assert "Closed 94 % (compose), 97 % (text) and 91 % (look) of three teachers' gaps" in page.text


def test_every_curve_is_drawn(run):
    _, page = read(run)
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert charts == [
        "Loss by task, over rounds",
        "Student's scores during training, over rounds",
        "Gradient norm, over rounds",
        "Seconds a round, over rounds",
    ]
    levels = [attrs for tag, attrs in page.tags if attrs.get("class") == "level"]
    assert len(levels) == 3  # a teacher's score for each taught task


def test_time_and_forwards_add_up(run):
    rows = [metrics_row(index) for index in range(80)]
    wall = sum(row["seconds"]["round"] for row in rows)
    _, page = read(run)
    roles = {row[0]: row[2:] for row in page.rows if row and row[0] in rows[0]["busy"]}
    assert roles["teacher"] == ["2 min 32 s", f"{152 / wall:.2f}", "51,840", "648"]
    widths = [
        float(attrs["style"].removeprefix("width:").removesuffix("%"))
        for tag, attrs in page.tags
        if re.fullmatch("t[0-4]", attrs.get("class") or "") and "title" in attrs
    ]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    assert widths[0] == pytest.approx(100 * 80 * 1.2 / wall, abs=0.01)


def test_an_unfinished_run_says_what_is_missing(tmp_path):
    run = write_run(tmp_path / "demo", rounds=3)
    (run / "result.json").unlink()
    (run / "samples/index.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "lo')  # the driver was killed in the middle of a line
    _, page = read(run)
    assert "No result yet: 3 of 80 rounds are recorded." in page.text
    assert "No scores" in page.text and "No samples" in page.text
    assert "result.json is not there" in page.text
    assert "metrics.jsonl has 1 unreadable line" in page.text


def test_an_empty_folder_still_gives_a_page(tmp_path):
    _, page = read(tmp_path)
    assert "No metrics" in page.text and "unfinished" in page.text


def test_a_run_without_evaluation(run):
    data = {**result(), "scores": {}, "gap_closed": {}, "status": "stopped"}
    (run / "result.json").write_text(json.dumps(data))
    _, page = read(run)
    assert "it can be resumed" in page.text and "not evaluated" in page.text


def test_numbers_that_are_not_finite_are_left_out(run):
    row = metrics_row(80)
    row["loss"]["text"] = float("nan")
    row["grad_norm"] = float("inf")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    text, _ = read(run)
    assert not re.search(r'points="[^"]*(nan|inf)', text)


def test_missing_broken_and_outside_images_are_named(run, tmp_path):
    picture(tmp_path / "secret.png", (1, 2, 3))
    index = json.loads((run / "samples/index.json").read_text())
    images = index["rows"][0]["images"]
    images["base"] = "../../secret.png"
    images["student"] = "gone.png"
    (run / "samples" / images["teacher:text"]).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (run / "samples/index.json").write_text(json.dumps(index))
    _, page = read(run)
    assert page.text.count("no image") == 3


def test_large_images_are_embedded_smaller(run):
    index = json.loads((run / "samples/index.json").read_text())
    for row in index["rows"]:
        picture(run / "samples" / row["images"]["base"], (9, 9, 9), size=1024)
    text, page = read(run)
    assert text.count("data:image/jpeg") == len(index["rows"])
    assert not any("pixels" in (attrs.get("class") or "") for _, attrs in page.tags)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunFolderError, match="no such run folder"):
        write_report(tmp_path / "nothing")
