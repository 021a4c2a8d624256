"""Pictures that were made elsewhere, in every layout that they come in."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from opd_ray.errors import PromptError
from opd_ray.evaluation.given import given_parts, given_pictures
from opd_ray.evaluation.hosts import ReadingHost
from opd_ray.storage.packing import unpack


def picture(path, side=8, color=(255, 0, 51)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), color, np.uint8)).save(path)


@pytest.fixture
def geneval(tmp_path):
    for number, (text, tag) in enumerate([("a photo of two cats", "counting"), ("a photo of a red dog", "colors")]):
        place = tmp_path / f"{number:05d}"
        for sample in range(2):
            picture(place / "samples" / f"{sample:04d}.png", 8 + 8 * number)
        row = {"tag": tag, "include": [{"class": "cat", "count": 2}], "prompt": text}
        (place / "metadata.jsonl").write_text(json.dumps(row))
        picture(place / "grid.png")  # GenEval writes one beside
    return tmp_path


def test_genevals_layout(geneval):
    found = given_pictures(geneval)
    assert [(one.file, one.sample) for one in found] == [
        *(("00000/samples/0000.png", 0), ("00000/samples/0001.png", 1)),
        *(("00001/samples/0000.png", 0), ("00001/samples/0001.png", 1)),
    ]
    first = found[0].prompt
    assert (first.id, first.text, first.task) == ("geneval/00000", "a photo of two cats", "geneval")
    assert first.metadata == {"tag": "counting", "include": [{"class": "cat", "count": 2}]}


def test_pictures_of_different_sizes_are_scored_one_size_at_a_time(geneval):
    parts = given_parts(geneval, given_pictures(geneval), 3)
    assert [len(part.prompts) for part in parts] == [2, 2] and len({part.name for part in parts}) == 2
    for part, side in zip(parts, (8, 16), strict=True):
        flat, done = ReadingHost().read(*part.args)
        images = unpack(flat, done.value.manifest)["images"]
        assert images.shape == (2, 3, side, side)
        assert images[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


@pytest.mark.parametrize(("name", "column"), [("metadata.jsonl", "file_name"), ("index.csv", "file")])
def test_a_list_of_files_and_prompts(tmp_path, name, column):
    for number in range(2):
        picture(tmp_path / "in" / f"{number}.png")
    rows = [(f"in/{number}.png", f"a cat {number}") for number in range(2)]
    if name.endswith("csv"):
        text = f"{column},prompt\n" + "".join(f"{file},{prompt}\n" for file, prompt in rows)
    else:
        text = "".join(json.dumps({column: file, "text": prompt}) + "\n" for file, prompt in rows)
    (tmp_path / name).write_text(text)
    found = given_pictures(tmp_path)
    assert [(one.file, one.prompt.text, one.prompt.task) for one in found] == [(*row, "pictures") for row in rows]
    (tmp_path / name).rename(tmp_path / f"mine{name[name.index('.') :]}")
    with pytest.raises(PromptError, match="no pictures that can be told from one another; expected GenEval's layout"):
        given_pictures(tmp_path)
    (mine,) = tmp_path.glob("mine.*")
    assert given_pictures(tmp_path, mine) == found


def test_a_runs_samples(tmp_path):
    files = {model: f"{model}/a-000.png" for model in ("base", "student")}
    for file in files.values():
        picture(tmp_path / "samples" / file)
    rows = [{"task": "a", "prompt": "a cat", "seed": 0, "images": files}]
    (tmp_path / "samples" / "index.json").write_text(json.dumps({"models": list(files), "rows": rows}))
    found = given_pictures(tmp_path)
    assert [(one.file, one.model) for one in found] == [(f"samples/{file}", model) for model, file in files.items()]
    assert given_pictures(tmp_path / "samples")[0].file == files["base"]
    assert [part.model for part in given_parts(tmp_path, found, 8)] == ["base", "student"]


def test_what_cannot_be_read_takes_no_other_picture_with_it(geneval):
    text, cut = (geneval / "00001" / "samples" / f"000{number}.png" for number in range(2))
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    text.write_text("no picture")
    parts = given_parts(geneval, given_pictures(geneval), 3)
    assert [len(part.prompts) for part in parts] == [2, 1, 1]
    whole, *broken = (ReadingHost().read(*part.args)[1].value.faults for part in parts)
    assert whole == {} and broken[0][0].startswith(f"{text} is no JPEG, PNG, WEBP")
    assert broken[1][0].startswith(f"{cut} is broken (")
    cut.unlink()
    assert ReadingHost().read(*parts[2].args)[1].value.faults == {
        0: f"{cut} cannot be read (No such file or directory)"
    }


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_pictures_are_seen_upright(tmp_path, kind, orientation):
    """Pillow's own turning is the measure; orientation 9 does not exist and means nothing."""
    shown = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((8, 8))).astype(np.uint8)  # of large squares
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(shown).convert("RGB").save(tmp_path / f"a.{kind}", exif=exif)
    Image.fromarray(shown).convert("RGB").save(tmp_path / f"b.{kind}")
    (tmp_path / "index.jsonl").write_text("".join(f'{{"file": "{name}.{kind}", "prompt": "a"}}\n' for name in "ab"))
    parts = given_parts(tmp_path, given_pictures(tmp_path), 1)
    seen, plain = (
        unpack(flat, done.value.manifest)["images"][0]
        for flat, done in (ReadingHost().read(*part.args) for part in parts)
    )
    with Image.open(tmp_path / f"a.{kind}") as picture:
        turned = np.array(ImageOps.exif_transpose(picture.convert("RGB")))
    assert (seen * 255).round().permute(1, 2, 0).numpy().tolist() == turned.tolist()
    assert plain.shape == (3, 16, 24) and seen.shape == ((3, 24, 16) if 5 <= orientation <= 8 else (3, 16, 24))
    assert torch.equal(seen, plain) == (orientation in (1, 9))


def test_what_cannot_be_scored_is_one_line(geneval, tmp_path):
    def refused(folder=geneval, prompts=None):
        with pytest.raises(PromptError) as caught:
            given_parts(folder, given_pictures(folder, prompts), 8)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no folder; expected GenEval's layout" in refused(geneval / "no")
    (geneval / "metadata.jsonl").write_text('{"prompt": "a cat", "file": "no.png"}')
    assert "1 of 1 pictures are not there, first no.png" in refused()
    for outside in ("../secret.png", "a/../../secret.png", str(geneval / "00000" / "samples" / "0000.png")):
        (geneval / "metadata.jsonl").write_text(json.dumps({"prompt": "a cat", "file": outside}))
        assert f"a row names the picture {outside!r}, which is not below this folder" in refused()
    (geneval / "text.png").write_text("no picture")
    (geneval / "metadata.jsonl").write_text('{"prompt": "a cat", "file": "text.png"}')
    assert "none of its 1 pictures is a JPEG, PNG, WEBP that can be read, first text.png" in refused()
    (geneval / "metadata.jsonl").write_text('{"prompt": "a cat"}')
    assert "the row of 'a cat' names no picture; give it a column file or file_name or image" in refused()
    (geneval / "metadata.jsonl").unlink()
    for old in (geneval / "00001" / "samples").iterdir():
        old.unlink()
    assert "samples has no pictures; expected .png" in refused()
    pq.write_table(pa.table({"a": [1]}), geneval / "images.parquet")
    assert "images.parquet is not the table of an evaluation" in refused()
