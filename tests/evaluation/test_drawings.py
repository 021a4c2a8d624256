"""Where an evaluation writes its pictures."""

from pathlib import Path

from opd_ray.config import ModelConfig
from opd_ray.evaluation.drawings import Drawing, parts_of
from opd_ray.evaluation.models import Found
from opd_ray.types import Prompt


def test_whatever_a_task_is_called_its_pictures_stay_in_their_models_folder(tmp_path):
    found = Found("m", ModelConfig(path="world"))
    drawn = [Drawing(name, name, found, 1.0, 4) for name in ("runs/..", "runs/" + "m" * 300)]
    tasks = ("..", ".", "a/b", "a%2Fb", "\u753b" * 90)
    prompts = {task: (Prompt("0", "a cat", task),) for task in tasks}
    parts = parts_of(drawn, prompts, tmp_path, images_per_prompt=2, seed=0, batch=8, pictures=None)
    files = [Path(file) for part in parts for file in part.args[1]]
    assert len(set(files)) == len(files) == 2 * 5 * 2
    for file in files:
        file.resolve().parent.mkdir(parents=True, exist_ok=True)  # no name is too long
        model, task, _ = file.resolve().relative_to(tmp_path / "pictures").parts
        assert model[0] in "01" and task[0] in "01234"
