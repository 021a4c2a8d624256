"""Every built-in reward scores one evaluation, from small random files of its own layout, and says what it used."""

import json
import math

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageDraw, ImageFont

from tests.rewards.conftest import NAMES, scorer
from tests.rewards.test_geneval import TINY_CLIP
from tests.rewards.tiny_geneval import make_clip, make_detector

ROWS = (
    {"prompt": 'a sign that says "hello"', "tag": "text"},
    {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]},
    {"prompt": "a red dog", "tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]},
)
RULES = ("ocr", "ocr_exact", "geneval", "geneval_strict", "geneval_partial", "jpeg_compressibility")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Prompts and rewards as files."""
    top = tmp_path_factory.mktemp("asked")
    (top / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = {name: scorer(name, top / name) for name in NAMES}
    rewards = {name: one.args | {"probe": "finite"} for name, one in made.items()}
    places = {"detector": str(make_detector(top / "detector")), "clip": str(make_clip(top / "clip"))}
    places |= {"clip_architecture": TINY_CLIP, "probe": "finite"}
    rewards |= {name: places if name.startswith("geneval") else {} for name in RULES}
    (top / "rewards.yaml").write_text(yaml.safe_dump(rewards))
    return top / "three.jsonl", top / "rewards.yaml", list(rewards)


def test_all_of_them_in_one_evaluation(cli, tiny, asked, tmp_path):
    prompts, rewards, names = asked
    out = tmp_path / "out"
    done = cli(
        "evaluate", tiny, "--prompts", prompts, "--rewards", rewards, "--steps", 2, "--guidance", 1, "--out", out
    )
    assert done.code == 0, done.err
    rows, summary = pq.read_table(out / "images.parquet").to_pylist(), json.loads((out / "summary.json").read_text())
    assert len(rows) == 3 and not any(row[f"error_{name}"] for row in rows for name in names)
    of_text, of_objects = rows[0], rows[1:]
    for name in names:
        found = [row[f"score_{name}"] for row in rows]
        applies = [value is not None and not math.isnan(value) for value in found]
        expected = {"ocr": [True, False, False], "geneval": [False, True, True]}.get(name.split("_")[0], [True] * 3)
        assert applies == expected, name
    assert of_text["score_ocr"] <= 1 and all(row["score_geneval"] in (0, 1) for row in of_objects)
    told = summary["versions"]["rewards"]
    assert told.keys() == set(names)
    assert told["ocr"]["proof"].startswith("ranks ") and told["pickscore"]["proof"] == "finite"
    for name in NAMES:
        assert all(len(digest) == 64 for digest in told[name]["weights"].values()) and told[name]["weights"], name


def test_words_on_larger_pictures_are_read_by_score(cli, tmp_path):
    """A right word and a wrong one, made elsewhere."""
    font, rows = ImageFont.load_default(size=48), []
    for index, (shown, wanted) in enumerate([("harbour", "harbour"), ("lantern", "window")]):
        image = Image.new("RGB", (384, 128), "white")
        ImageDraw.Draw(image).text((40, 30), shown, fill="black", font=font)
        image.save(tmp_path / f"{index}.png")
        rows.append({"file": f"{index}.png", "prompt": f'the word "{wanted}"'})
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("score", tmp_path, "--rewards", "ocr,ocr_exact", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    right, wrong = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    assert right["score_ocr"] == right["score_ocr_exact"] == 1.0
    assert wrong["score_ocr"] < 0.5 and wrong["score_ocr_exact"] < 0.5
