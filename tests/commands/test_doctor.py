"""The doctor sees what is broken, says so in one line, and its exit code tells."""

import importlib.metadata
import io
import json
import os
import shutil
import sys
from collections import namedtuple

import pytest
from torch import distributed

from opd_ray import world
from opd_ray.errors import WorkerLostError
from opd_ray.planning import doctor
from opd_ray.recipes import find, load
from opd_ray.runtime import trial
from tests.deploy.kustomize import KUBERAY

Usage = namedtuple("Usage", "total used free")
CHECKS = [
    "Python", "packages", "tested set", "torch", "GPUs", "gloo", "Ray", "killed runs", "working folder", "model cache",
    "shared memory", "hub token", "hub", "built-in world",
]  # fmt: skip


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A copy of the world's files that may be broken."""
    monkeypatch.setattr(world, "_SHIPPED", shutil.copytree(world._SHIPPED, tmp_path / "shipped"))
    return tmp_path / "shipped"


def free(monkeypatch, size):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(size, 0, size))


def versions(monkeypatch, **changed):
    real = importlib.metadata.version

    def version(name):
        if changed.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


class TestCommand:
    def test_every_check_is_one_line(self, cli, no_token):
        done = cli("doctor")
        lines = done.out.splitlines()
        assert [line[9:].split(":")[0] for line in lines] == CHECKS
        assert {line[:9].strip() for line in lines} <= {"ok", "warning"} and done.code == 0
        assert any(line.endswith("not started (--ray tries it)") for line in lines)

    def test_json_is_a_list_of_records(self, cli):
        records = json.loads(cli("doctor", "--json").out)
        assert [record["check"] for record in records] == CHECKS
        assert all(list(record) == ["check", "status", "found", "advice"] for record in records)

    def test_a_problem_is_exit_code_2(self, cli, monkeypatch):
        free(monkeypatch, 10**8)
        done = cli("doctor")
        assert done.code == 2
        assert "problem  working folder: 0.1 GB free (free some, or give --out)" in done.out.splitlines()

    def test_the_object_store_is_the_recipes(self, cli, tmp_path):
        recipe = find("demo").read_text().replace("cluster: local", "cluster: {object_store_mb: 100}")
        (tmp_path / "small.yaml").write_text(recipe)
        assert "object store 100 MiB" in cli("doctor", tmp_path / "small.yaml").out
        assert "no recipe 'nope'" in cli("doctor", "nope").error

    def test_a_broken_import_is_a_problem_and_the_other_checks_go_on(self, cli, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        done = cli("doctor")
        (line,) = (line for line in done.out.splitlines() if "torch:" in line)
        assert line.startswith("problem  torch: ModuleNotFoundError: ") and "(install again" in line
        assert len(done.out.splitlines()) == len(CHECKS) and done.code == 2


def test_another_python(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert doctor.python().status == "problem" and "3.9.1, outside" in doctor.python().found


def test_packages_out_of_range_and_missing(monkeypatch):
    versions(monkeypatch, torch="1.0", peft=None)
    finding = doctor.packages()
    assert finding.status == "problem" and finding.found.count("needs") == 2
    assert "torch 1.0 (needs <3,>=2.8)" in finding.found and "peft missing (needs" in finding.found


def test_another_release_than_the_tested_one(monkeypatch):
    versions(monkeypatch, pydantic="2.10.0", torch="2.14.1+cpu", pytest=None)
    finding = doctor.tested_set()
    assert finding.status == "warning" and finding.found.startswith("pydantic 2.10.0 (tested 2.")
    assert "torch" not in finding.found and "pytest" not in finding.found


@pytest.mark.parametrize("place", [".", "opd_ray", None])
def test_the_tested_set_is_looked_for_in_the_checkout_and_in_the_package(monkeypatch, tmp_path, place):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "opd_ray" / "planning" / "doctor.py"))
    (tmp_path / "opd_ray").mkdir()
    if place:
        (tmp_path / place / "constraints.txt").write_text("# pins\npydantic==0.1\n")
    finding = doctor.tested_set()
    assert finding.status == "warning"
    assert ("(tested 0.1)" if place else "constraints.txt not found") in finding.found


def test_cards_are_counted_by_name_and_memory(monkeypatch):
    card = namedtuple("Card", "name total_memory")("A 1", 80 * 10**9)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    assert doctor.gpus() == doctor.Finding("ok", "2 x A 1 with 80 GB")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert doctor.gpus() == doctor.Finding("ok", "none: runs on CPU")


def test_gloo_is_opened_used_and_closed(monkeypatch):
    summed = []
    real = distributed.all_reduce
    monkeypatch.setattr(distributed, "all_reduce", lambda x: summed.append(distributed.get_backend()) or real(x))
    assert doctor.gloo().status == "ok" and summed == ["gloo"] and not distributed.is_initialized()
    monkeypatch.setattr(distributed, "init_process_group", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        doctor.gloo()

    def refused(*args, **kwargs):
        raise RuntimeError("no interface\nfound")

    monkeypatch.setattr(distributed, "init_process_group", refused)
    assert doctor.gloo().status == "problem" and doctor.gloo().found == "RuntimeError: no interface found"


@pytest.mark.parametrize(("size", "status"), [(9 * 10**8, "problem"), (4 * 10**9, "warning"), (6 * 10**9, "ok")])
def test_free_disk(monkeypatch, size, status):
    free(monkeypatch, size)
    assert doctor.working_folder().status == status


def test_the_cache_is_measured_where_it_will_be(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or Usage(0, 0, 10**10))
    assert doctor.model_cache().status == "warning" and seen == [tmp_path]


def test_a_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert doctor.working_folder() == doctor.Finding(
        "problem", "cannot be written", "work in another one, or give --out"
    )


def test_shared_memory_that_is_too_small(monkeypatch):
    free(monkeypatch, 64 * 2**20)
    assert doctor.shared_memory(64).status == "ok"
    finding = doctor.shared_memory(256)
    assert finding.status == "warning" and finding.found == "64 MiB free in /dev/shm, object store 256 MiB"


def test_the_token_is_never_shown(monkeypatch, no_token, cli):
    assert doctor.hub_token().status == "warning"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = cli("doctor", "--json")
    assert "set in HF_TOKEN" in done.out and "secret" not in done.out + done.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert doctor.hub_token() == doctor.Finding("ok", "stored by a login")


def test_offline_mode(monkeypatch):
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert doctor.hub_mode().found.startswith("offline" if offline else "online")


def test_the_worlds_files_are_those_that_are_there():
    there = {path for path in world._SHIPPED.rglob("*") if path.is_file()}
    assert set(world.shipped_files()) == there


@pytest.mark.parametrize("path", ["pipeline/vae/config.json", "lora/text/pytorch_lora_weights.safetensors"])
def test_a_file_of_the_world_that_is_missing(shipped, path):
    (shipped / path).unlink()
    finding = doctor.built_in_world()
    assert finding.status == "problem" and path.partition("/")[2] in finding.found


def test_a_file_of_the_world_that_is_cut_off(shipped):
    path = shipped / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    (shipped / "prompts/text_train.jsonl").write_text("")
    found = doctor.built_in_world().found
    assert "transformer/diffusion_pytorch_model.safetensors" in found and "text_train.jsonl is empty" in found


@pytest.mark.ray
def test_ray_is_tried_on_request(ray_session, cli):
    (line,) = (line for line in cli("doctor", "--ray").out.splitlines() if line[9:].startswith("Ray:"))
    assert line.startswith("ok       Ray: 2.") and ", one worker answered after " in line


def test_a_ray_that_does_not_start_is_a_problem(monkeypatch):
    class Broken:
        def __init__(self, object_store_mb):
            raise ConnectionError("no\nport")

    monkeypatch.setattr(trial, "RayBackend", Broken)
    with pytest.raises(WorkerLostError, match=r"^it did not start \(no port\)$"):
        trial.try_ray(256)
    finding = doctor.try_ray(256)
    assert finding.status == "problem" and "it did not start (no port)" in finding.found
    assert finding.advice.endswith("cluster.runtime=local works without")


def test_a_worker_that_does_not_answer_is_a_problem_and_ray_is_ended(monkeypatch):
    ended = []

    class Silent:
        def __init__(self, object_store_mb):
            self.lack = None

        def shortage(self, specs):
            return None

        def start(self, spec, name):
            return self

        def call(self, method, bulk):
            return namedtuple("Call", "done")(None)

        def wait(self, refs, timeout_s):
            return []

        def close(self):
            ended.append(True)

    monkeypatch.setattr(trial, "RayBackend", Silent)
    with pytest.raises(WorkerLostError, match="its worker did not answer within 3 s"):
        trial.try_ray(256, 3)
    assert ended == [True]


class TestManifests:
    """`--manifests` compares KubeRay's groups with the recipe's cluster; each refusal is in tests/planning."""

    def told(self, done):
        (line,) = (line for line in done.out.splitlines() if line[9:].startswith("manifests: "))
        return line

    def test_what_we_ship_belongs_together(self, cli):
        done = cli("doctor", "sd35_mopd", "-o", "cluster=kuberay", "--manifests", KUBERAY / "base" / "cluster.yaml")
        assert self.told(done) == "ok       manifests: 5 groups of RayCluster opd-ray for 6 roles" and done.code == 0

    def test_a_group_that_no_role_uses_is_a_problem(self, cli, monkeypatch):
        text = (KUBERAY / "base" / "cluster.yaml").read_text()
        extra = text[text.index("    - groupName: reward") :].replace("reward", "judge")
        monkeypatch.setattr(sys, "stdin", io.StringIO(text + extra))
        done = cli("doctor", "sd35_mopd", "-o", "cluster=kuberay", "--manifests", "-")
        assert done.code == 2
        assert "-: RayCluster opd-ray: no role uses group 'judge': none asks for judge_node; asked" in self.told(done)

    def test_a_file_that_is_not_there_is_a_problem(self, tmp_path):
        finding = doctor.fitting_manifests(load("demo"), tmp_path / "gone.yaml")
        assert finding.status == "problem" and "gone.yaml cannot be read" in finding.found
