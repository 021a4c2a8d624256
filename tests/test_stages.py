"""What is said of a job's stages by their configurations and folders alone: nothing is trained."""

import json
from pathlib import Path

import pytest

from opd_ray.errors import RunFolderError
from opd_ray.preflight import identity
from opd_ray.recipes import load
from opd_ray.stages import Stage, stages, standing


def job(folder, *changes) -> dict[str, Stage]:
    """The stages of the shipped job by name, of which `compose` has 20 rounds; ``changes`` are of that one."""
    first, student = stages(load("world_two_stages", [f"specialists.compose.set.{text}" for text in changes]), folder)
    return {stage.config.name: stage for stage in (*first, student)}


def trained(stage: Stage, rounds: int | None = None) -> Stage:
    """Its folder, as a run leaves it: at its end, or after so many rounds."""
    (stage.folder / "lora").mkdir(parents=True)
    (stage.folder / "run.json").write_text(json.dumps({"attempt": 0, "identity": identity(stage.config)}))
    result = {"status": "done" if rounds is None else "stopped", "rounds": rounds or stage.config.rounds}
    (stage.folder / "result.json").write_text(json.dumps(result))
    return stage


class TestStanding:
    def test_by_its_folder(self, tmp_path):
        compose = job(tmp_path)["compose"]
        assert standing(compose, resume=False) == "new"
        trained(compose, rounds=4)
        assert standing(compose, resume=True) == "begun"
        with pytest.raises(RunFolderError, match=r"compose was begun already; go on with --resume"):
            standing(compose, resume=False)

    def test_what_has_ended_and_left_no_weights_goes_on(self, tmp_path):
        compose = trained(job(tmp_path)["compose"])
        assert standing(compose, resume=False) == "done"
        (compose.folder / "lora").rmdir()
        assert standing(compose, resume=True) == "begun"

    @pytest.mark.parametrize("force", [False, True])
    def test_a_specialist_that_ended_otherwise_is_refused_also_with_force(self, tmp_path, force):
        trained(job(tmp_path)["compose"])
        other = job(tmp_path, "optimizer={lr: 0.5}")["compose"]
        said = r"specialist compose: .* has come to its end, trained otherwise: optimizer.lr was .*, now 0.5. Give"
        with pytest.raises(RunFolderError, match=said):
            standing(other, resume=True, force=force)
        (other.folder / "lora").rmdir()
        with pytest.raises(RunFolderError, match=said):
            standing(other, resume=True, force=force)

    def test_one_that_was_begun_otherwise_goes_on_with_force(self, tmp_path):
        trained(job(tmp_path)["compose"], rounds=4)
        other = job(tmp_path, "optimizer={lr: 0.5}")["compose"]
        with pytest.raises(RunFolderError, match=r"was trained otherwise: .* add --resume --force"):
            standing(other, resume=True)
        assert standing(other, resume=True, force=True) == "begun"

    @pytest.mark.parametrize(("rounds", "stands"), [(4, "begun"), (None, "done")])
    def test_a_job_that_was_moved_goes_on_with_force(self, tmp_path, rounds, stands):
        here = job(tmp_path / "here")
        trained(here["compose"]), trained(here["student"], rounds)
        moved = job(Path(tmp_path / "here").rename(tmp_path / "there"))
        assert standing(moved["compose"], resume=True) == standing(moved["compose"], resume=True, force=True) == "done"
        with pytest.raises(RunFolderError, match=r"student: .* trained otherwise: teachers.compose.lora was .*here"):
            standing(moved["student"], resume=True)
        assert standing(moved["student"], resume=True, force=True) == stands
