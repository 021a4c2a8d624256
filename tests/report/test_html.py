"""The report page: complete, self-contained, and safe with other people's text."""

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from opd_ray.errors import RunFolderError
from opd_ray.report.html import SCRIPT, write_report
from tests.report.run_folders import (
    ATTACK,
    MODELS,
    PROMPTS,
    TASKS,
    metrics_row,
    picture,
    result,
    write_run,
)

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


def test_the_page_needs_no_network(run):
    index = (run / "samples/index.json").read_text().replace(PROMPTS["look"], "a poster of https://example.org/a.png")
    (run / "samples/index.json").write_text(index)
    text, page = read(run)
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(TASKS) * 2 * len(MODELS)
    assert all(source.startswith("data:image/png;base64,") for source in images)
    addresses = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}
    ]
    assert {value[:5] for value in addresses if value[0] != "#"} == {"data:"}
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    style += "".join(attrs.get("style") or "" for _, attrs in page.tags)
    assert "url(" not in style and "@import" not in style
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert [p.name for p in run.iterdir() if "tmp" in p.name] == []


def test_the_policy_admits_the_one_script_alone(run):
    text, page = read(run)
    script = SCRIPT.read_text()
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]
    assert text.count(f"<script>{script}</script>") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["script-src"] == f"'sha256-{digest}'" and allowed["default-src"] == "'none'"
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_other_peoples_text_appears_escaped_only(run):
    text, page = read(run)
    assert text.count("<script") == 1  # the page's own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text  # a prompt, and a fact of run.json
    assert "&lt;/pre&gt;&lt;script&gt;alert(2)" in text  # the configuration
    assert ATTACK in page.text
    assert any(attrs.get("alt") == f"student: {ATTACK}" for _, attrs in page.tags)


def test_every_row_opens_and_leads_on(run):
    _, page = read(run)
    amount = len(TASKS) * 2
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) == 2 * amount
    links = {
        kind: [attrs["href"] for tag, attrs in page.tags if tag == "a" and attrs.get("class") == kind]
        for kind in ("before", "after", "close")
    }
    rows = [f"#row-{place}" for place in range(1, amount + 1)]
    assert links == {
        "before": [rows[-1], *rows[:-1]],
        "after": [*rows[1:], rows[0]],
        "close": [row.replace("row", "at") for row in rows],
    }
    assert all(attrs["href"][1:] in ids for tag, attrs in page.tags if tag == "a")


def test_names_are_other_peoples_text_too(run):
    name = "<img src=x onerror=alert(1)>"
    data = json.loads(json.dumps(result()).replace("compose", name).replace("0.0.80", name))
    data["status"] = name
    (run / "result.json").write_text(json.dumps(data))
    row = json.loads(json.dumps(metrics_row(80)).replace("compose", name).replace("rollout", name))
    (run / "metrics.jsonl").write_text(json.dumps({**row, "scores": {name: 0.5}}))
    index = (run / "samples/index.json").read_text().replace('"task": "compose"', f'"task": "{name}"')
    (run / "samples/index.json").write_text(index)
    for file in ("config.yaml", "run.json"):
        said = (run / file).read_text()
        (run / file).write_text(said.replace("compose", name).replace("2.15.0", name).replace("sd3", name))
    text, page = read(run)
    assert "<img src=x" not in text and "&lt;img src=x" in text
    settings = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert all(name in settings[key] for key in ("model", "teachers", "versions"))


def test_the_table_says_what_result_json_says(run):
    _, page = read(run)
    heads = next(row for row in page.rows if row[1:] == TASKS)
    expected = result()
    start = page.rows.index(heads) + 1
    rows = {row[0]: row[1:] for row in page.rows[start : start + len(MODELS) + 1]}  # further down is the roles' table
    for model, scores in expected["scores"].items():
        title = f"{model.removeprefix('teacher:')} teacher" if ":" in model else model
        assert [float(cell) for cell in rows[title]] == [scores[task]["value"] for task in TASKS]
    assert rows["gap closed"] == ["94 %", "97 %", "91 %", "–"]  # noqa: RUF001
    own = [attrs["title"] for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "own"]
    assert own == ["0.871", "0.914", "0.893"]
    assert "Closed 94 % (compose), 97 % (text) and 91 % (look) of three teachers' gaps" in page.text


BANDS = {
    "rollout": "rollout",
    "compose teacher": "teacher.compose",
    "text teacher": "teacher.text",
    "look teacher": "teacher.look",
    "reward": "reward",
    "learner": "learner",
}
STATES = {
    "busy": "busy",
    "transfer": "transfer",
    "input": "waiting for input",
    "output": "waiting for output",
}


def spent(*roles: str) -> list[int]:
    """Percent of each state in the roles' worker-seconds of all 80 rounds."""
    uses = [metrics_row(index)["roles"][role] for index in range(80) for role in roles]
    whole = sum(
        row["roles"][role]["workers"] * row["seconds"]["round"] for row in map(metrics_row, range(80)) for role in roles
    )
    return [round(100 * sum(use[state] for use in uses) / whole) for state in STATES]


def said(title: str) -> str:
    return ", ".join(f"{name} {x} %" for name, x in zip(STATES.values(), spent(BANDS[title]), strict=True))


def test_every_curve_is_drawn(run):
    _, page = read(run)
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert charts == [
        "Loss by task, over rounds",
        "Student's scores during training, over rounds",
        "Gradient norm, over rounds",
        *(f"Gap of {task}, over denoising steps" for task in TASKS[:3]),
        "Seconds a round, over rounds",
        "Busy seconds a round, over rounds",
        *(f"{role}: {said(role)}" for role in BANDS),
    ]
    levels = [attrs for tag, attrs in page.tags if attrs.get("class") == "level"]
    assert len(levels) == 3  # a teacher's score for each taught task


def test_the_gap_is_that_of_the_first_rounds_and_of_the_last(run):
    _, page = read(run)
    start = next(place for place, row in enumerate(page.rows) if row[:2] == ["step", "0"])
    assert page.rows[start] == ["step", *map(str, range(9))]
    rows = [metrics_row(index) for index in range(80)]
    for task, lines in zip(TASKS, zip(*[iter(page.rows[start + 1 : start + 10])] * 3, strict=True), strict=False):
        means = [
            [sum(row["gap"][task][str(step)] for row in part) / 10 for step in range(9)]
            for part in (rows[:10], rows[70:])
        ]
        before, after, times = ([float(x) for x in line[1:]] for line in lines)
        assert [lines[0][0], lines[1][0]] == [f"{task} rounds 1–10", "rounds 71–80"]  # noqa: RUF001
        assert before == pytest.approx(means[0], abs=0.005) and after == pytest.approx(means[1], abs=0.005)
        assert times == pytest.approx([b / a for b, a in zip(*means, strict=True)], abs=0.05)
        for column in range(1, 10):  # the same decimals down a column
            assert len({len(row[column].split(".")[1]) for row in page.rows[start + 1 : start + 9 : 3]}) == 1
        change = sum(means[0]) / sum(means[1])
        assert f"{task} {change:.1f} times smaller" in page.text


@pytest.mark.parametrize(
    ("rounds", "labels"), [(1, ["compose round 1"]), (3, ["compose round 1", "round 3", "times smaller"])]
)
def test_the_first_rounds_and_the_last_never_overlap(tmp_path, rounds, labels):
    _, page = read(write_run(tmp_path / "demo", rounds=rounds))
    heads = [row[0] for row in page.rows if row]
    start = heads.index("compose round 1")
    assert heads[start : heads.index("text round 1")] == labels


def test_time_and_forwards_add_up(run):
    rows = [metrics_row(index) for index in range(80)]
    wall = sum(row["seconds"]["round"] for row in rows)
    _, page = read(run)
    roles = {row[0]: row[1:] for row in page.rows if row and row[0] in {*rows[0]["busy"], "all"}}
    teachers = [f"{x} %" for x in spent("teacher.compose", "teacher.text", "teacher.look")]
    assert roles["teacher"] == ["2 min 32 s", f"{152 / wall:.2f}", *teachers, "–", "51,840", "648"]  # noqa: RUF001
    whole = [f"{x} %" for x in spent(*BANDS.values())]
    assert roles["all"] == ["5 min 4 s", f"{304 / wall:.2f}", *whole, "–", "161,280", "2,016"]  # noqa: RUF001
    queued = sum(row["roles"]["teacher.text"]["queued"] for row in rows) / wall
    text = [row for row in page.rows if row[:1] == ["text teacher"]][-1]
    assert text[1:3] == ["1 min 12 s", f"{72 / wall:.2f}"]
    assert text[3:] == [*(f"{x} %" for x in spent("teacher.text")), f"{round(100 * queued)} %", "–", "–"]  # noqa: RUF001
    assert "waiting for experience 1 min 36 s" in page.text
    stack = page.text.split("Seconds a round")[1]
    assert "round 1: updating and publishing 0.9" in stack and ", waiting for experience 1.20" in stack


def test_the_stacks_are_as_high_as_their_sums(run):
    text, _ = read(run)
    busy = text.split('aria-label="Busy seconds')[1].split("</svg>")[0]
    edges = [[float(y) for y in re.findall(r"V([\d.]+)", path)] for path in re.findall(r'd="(M[^"]+)"', busy)]
    assert [len(path) for path in edges] == [160] * 4
    for below, above in pairwise(edges):
        assert above[1::2] == below[0::2]  # each starts where the one below ends
    floor = edges[0][1]
    high = [floor - path[0] for path in edges]
    assert [h / high[-1] for h in high] == pytest.approx([1.1 / 3.8, 3 / 3.8, 3.1 / 3.8, 1], abs=0.002)


def test_settings_and_versions_are_open(run):
    _, page = read(run)
    facts = {row[0]: row[1].split() for row in page.rows if len(row) == 2}
    assert facts["model"] == ["family", "sd3", "path", "world"]
    assert facts["versions"] == ["torch", "2.15.0", "ray", "2.60.0"]
    assert facts["rounds"] == ["80"]


def test_a_page_of_very_many_pictures_stays_below_10_mb(run):
    tasks = [f"task {index}" for index in range(30)]
    noise = run / "samples/noise.png"
    size = (160, 160)
    Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1])).save(noise)
    assert noise.stat().st_size * len(tasks) * 8 * len(MODELS) > 50e6
    images = dict.fromkeys(MODELS, noise.name)
    rows = [{"task": task, "prompt": str(i), "seed": i, "images": images} for task in tasks for i in range(8)]
    (run / "samples/index.json").write_text(json.dumps({"models": MODELS, "rows": rows}))
    text, page = read(run)
    assert len(text.encode()) < 10e6
    shown = {f"task {index}" for index in range(30)}
    assert all(task in page.text for task in shown)  # rows are left out, no task is
    assert "180 more rows are in samples/." in page.text


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


def test_a_run_on_rewards_shows_what_its_algorithm_measures_and_no_teacher(run):
    scores = {model: {"look": {"value": x, "n": 64}} for model, x in (("base", 0.2), ("student", 0.5))}
    data = result() | {"teachers": {}, "scores": scores, "gap_closed": {}, "evaluation": {"steps": 4, "seed": 7}}
    (run / "result.json").write_text(json.dumps(data))
    (run / "config.yaml").write_text("name: pso\nteachers: {}\n")
    rows = []
    for index in range(4):
        steps = {"look": {"0": 1e-3 * index, "1": 3e-3 * index}}
        told = {"ratio": steps, "clipped": steps, "ties": {"look": {"0": 0.5, "1": 0.7}}, "accuracy": steps}
        told |= {"error_better": steps, "reference_better": steps, "scores": {"look": 0.2 + 0.1 * index}}
        rows.append({"round": index, "loss": {"total": 0.7, "look": 0.7}, "grad_norm": 0.1} | told)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, page = read(run)
    charts = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert charts == [
        "Loss by task, over rounds",
        "Reward scores of what the student drew, over rounds",
        "Pairs whose better image is preferred, over rounds",
        "Prompts whose images are equally good, over rounds",
        "Log-ratio to what the likelihood is compared with, over rounds",
        "Rows beyond the clip range, over rounds",
        "Errors of prediction, over rounds",
        "Gradient norm, over rounds",
    ]
    said = " ".join(page.text.split())
    assert "look 0.600" in said, "ties, mean over steps"
    assert "better 0 → 0.006" in said and "better, of the frozen start 0 → 0.006" in said
    assert "On held-out prompts: look 0.200 → 0.500." in said
    before = text.partition("Settings and versions")[0].partition("<main>")[2].lower()
    assert "taught" not in before and "its teacher" not in before and "a teacher on" not in before
