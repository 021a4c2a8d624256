"""What is said of a job's stages by their configurations and folders alone: nothing is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from opd_ray.actors.recorded import recordings
from opd_ray.algorithms import make_algorithm
from opd_ray.errors import PlacementError, PromptError, RunFolderError
from opd_ray.experience import ExperienceSource, PairSource, RecordedSource
from opd_ray.metrics import MetricsLog
from opd_ray.pairs.index import index_pairs
from opd_ray.preflight import drawn_prompts, identity
from opd_ray.prompts import PromptStream
from opd_ray.recipes import load
from opd_ray.runtime.local import LocalBackend
from opd_ray.stages import Stage, check_room, costs, stages, standing
from opd_ray.storage.checkpoint import Checkpoint, save

PAIR = json.dumps({"prompt": "a red cat", "winner": "w.jpg", "loser": "l.jpg"})


def job(folder, *changes) -> dict[str, Stage]:
    """The stages of the shipped job by name, of which `compose` has 20 rounds; ``changes`` are of that one."""
    first, student = stages(load("world_two_stages", [f"specialists.compose.set.{text}" for text in changes]), folder)
    return {stage.config.name: stage for stage in (*first, student)}


def trained(stage: Stage, rounds: int | None = None, source: ExperienceSource | None = None) -> Stage:
    """Its folder, as a run leaves it: at its end, or after so many rounds. Without a source it drew its prompts."""
    (stage.folder / "lora").mkdir(parents=True)
    (stage.folder / "run.json").write_text(json.dumps({"attempt": 0, "identity": identity(stage.config)}))
    result = {"status": "done" if rounds is None else "stopped", "rounds": rounds or stage.config.rounds}
    (stage.folder / "result.json").write_text(json.dumps(result))
    prompts = source.prompts() if source else PromptStream(drawn_prompts(stage.config), stage.config.seed).digests()
    state = {"driver": {"prompts": prompts}}
    kept = Checkpoint(result["rounds"], {"student": {"weight": torch.ones(1)}}, state)
    save(stage.folder, kept, attempt=0, keep=1)
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

    @pytest.mark.parametrize("force", [False, True])
    def test_a_specialist_that_ended_with_other_prompts_is_refused_wherever_they_lie(self, tmp_path, force):
        here, there = tmp_path / "here.txt", tmp_path / "there.txt"
        here.write_text("a red cat\ntwo dogs\n")
        compose = trained(job(tmp_path, f"prompts={{train: {{compose: {here}}}}}")["compose"])
        shutil.copy(here, there)
        moved = job(tmp_path, f"prompts={{train: {{compose: {there}}}}}")["compose"]
        for stage in (compose, moved):
            assert standing(stage, resume=True, force=force) == "done"
        there.write_text("a red cat\nthree dogs\n")
        assert standing(compose, resume=True, force=force) == "done"
        here.write_text("two dogs\na red cat\n")  # another order is another training
        for stage in (compose, moved):
            with pytest.raises(
                RunFolderError, match=r"compose: .* trained otherwise: prompts of compose are others now"
            ):
                standing(stage, resume=True, force=force)
        here.unlink()
        with pytest.raises(PromptError, match=r"specialist compose: .*here.txt"):
            standing(compose, resume=True, force=force)

    def test_recordings_and_pairs_count_as_prompts_do(self, tmp_path):
        folder, file = tmp_path / "recorded" / "look", tmp_path / "pairs.jsonl"
        folder.mkdir(parents=True)
        (folder / "0.safetensors").touch()
        file.write_text(f"{PAIR}\n{PAIR}\n")
        read = load("world_sft", ["name=read", f"recorded={folder.parent}"])
        paired = load("pso_style", ["name=paired", f"pairs.files=[{file}]"])
        assert read.recorded and paired.pairs
        sources = (
            RecordedSource(read, make_algorithm(read), recordings(read.recorded), None, None),
            PairSource(paired, make_algorithm(paired), index_pairs(paired.pairs), None, None),
        )
        ended = [trained(Stage(each.config, tmp_path / each.config.name), source=each) for each in sources]
        assert [standing(stage, resume=False) for stage in ended] == ["done", "done"]
        (folder / "1.safetensors").touch()
        file.write_text(f"{PAIR}\n{PAIR}\n{PAIR}\n")
        for stage in ended:
            with pytest.raises(RunFolderError, match=r"trained otherwise: prompts of \w+ are others now"):
                standing(stage, resume=False)

    def test_a_specialist_whose_checkpoints_are_gone_is_refused(self, tmp_path):
        compose = trained(job(tmp_path)["compose"])
        (damaged,) = compose.folder.glob("checkpoints/*/student.safetensors")
        damaged.write_bytes(b"")
        with pytest.raises(RunFolderError, match=r"compose: .*no checkpoint says .* prompts it learned \(.* damaged"):
            standing(compose, resume=True, force=True)
        shutil.rmtree(compose.folder / "checkpoints")
        with pytest.raises(RunFolderError, match=r"compose: .*no checkpoint says from which prompts it learned. Give"):
            standing(compose, resume=True, force=True)

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


def test_what_a_stage_took_counts_each_thread_of_a_worker(tmp_path):
    changes = ["cluster.rollout.threads=2", "cluster.learner.threads=3"]
    stages = job(tmp_path, *changes)
    row = {"loss": {"compose": 0.1, "total": 0.1}, "seconds": {"round": 4.0}}
    busy = {"rollout": 5.0, "learner": 1.0, "clerk": 0.5}  # the last one is in no configuration, and has one thread
    MetricsLog(trained(stages["compose"]).folder / "metrics.jsonl").append(row | {"busy": busy})
    first, student = [stages["compose"]], stages["student"]
    images = stages["compose"].config.batch.images_per_task
    took = {"rounds": 1, "images": images, "seconds": 4.0, "core_seconds": 2 * 5.0 + 3 * 1.0 + 0.5}
    assert costs(first, student)["compose"] == took


def test_stages_at_the_same_time_share_an_object_store(tmp_path):
    compose = job(tmp_path)["compose"]
    compose.write(3)
    written = load(str(compose.recipe))
    assert written.cluster.plasma_fraction == pytest.approx(compose.config.cluster.plasma_fraction / 3)
    cluster = written.cluster.model_copy(update={"plasma_fraction": compose.config.cluster.plasma_fraction})
    assert written.model_copy(update={"cluster": cluster}) == compose.config, "and nothing else differs"


class Full(LocalBackend):
    """Has no room, and says how much was asked for."""

    def shortage(self, specs, *, free=False):
        return f"no room for {len(specs)}"


def test_stages_without_room_are_refused_unless_nodes_may_come(tmp_path):
    stages = job(tmp_path)
    both = [stages["compose"], stages["text"]]
    said = f"specialist compose and specialist text at the same time: no room for {2 * 3}"
    with pytest.raises(PlacementError, match=said):
        check_room(Full(), both)
    check_room(LocalBackend(), both)
    stages = job(tmp_path, "cluster.nodes_may_come=true")  # of one of them is enough
    check_room(Full(), [stages["compose"], stages["text"]])
