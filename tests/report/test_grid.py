"""The picture grid as a PNG."""

import json

import pytest
from PIL import Image

from opd_ray.errors import RunFolderError
from opd_ray.report.grid import ACCENT, write_grid
from tests.report.run_folders import MODELS, TASKS, write_run, write_samples


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo")


def test_every_picture_is_in_the_grid_enlarged_by_whole_pixels(run, tmp_path):
    with Image.open(write_grid(run, tmp_path / "out/grid.png", scale=3)) as grid:
        grid = grid.convert("RGB")
    side, gap, left, top = 96, 8, 216, 50
    assert grid.width == left + len(MODELS) * (side + gap) - gap + 16
    index = json.loads((run / "samples/index.json").read_text())
    for place, row in enumerate(index["rows"]):
        y = top + place * (side + gap) + 10 * (place // 2)
        for column, model in enumerate(MODELS):
            x = left + column * (side + gap)
            with Image.open(run / "samples" / row["images"][model]) as image:
                expected = image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            assert grid.crop((x, y, x + side, y + side)).tobytes() == expected.tobytes()


def test_a_teacher_is_framed_on_its_own_task_alone(run, tmp_path):
    with Image.open(write_grid(run, tmp_path / "grid.png", rows_per_task=1)) as grid:
        grid = grid.convert("RGB")
    accent = tuple(int(ACCENT[i : i + 2], 16) for i in (1, 3, 5))
    framed = {
        (task, model)
        for place, task in enumerate(TASKS)
        for column, model in enumerate(MODELS)
        if grid.getpixel((216 + 104 * column - 3, 50 + 114 * place + 48)) == accent
    }
    assert framed == {(task, f"teacher:{task}") for task in TASKS[:3]}


def test_large_pictures_are_fitted(run, tmp_path):
    write_samples(run / "samples", rows_per_task=1, size=512)
    with Image.open(write_grid(run, tmp_path / "grid.png")) as grid:
        assert grid.width < 1800


def test_without_samples_the_error_says_what_to_do(run, tmp_path):
    (run / "samples/index.json").unlink()
    with pytest.raises(RunFolderError, match=r"prompts\.eval and rewards"):
        write_grid(run, tmp_path / "grid.png")
