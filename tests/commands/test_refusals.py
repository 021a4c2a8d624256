"""The user's errors: exit code 2, one line that says what, where, what was allowed and what to do; nothing started."""

import json
import os
import shutil
import time

import pytest
import yaml
from safetensors.torch import load_file, save_file

from opd_ray.preflight import identity
from opd_ray.recipes import load
from opd_ray.storage.run_folder import claim, write_json_atomic
from tests.commands.conftest import BRIGHT
from tests.models.tiny_sd3 import make_tiny_sd3

pytestmark = pytest.mark.usefixtures("no_start")
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def refused(cli, recipe, tmp_path):
    """The line with which `train` refuses a recipe, having made no run folder."""

    def refuse(*overrides, **sections) -> str:
        options = [part for override in overrides for part in ("-o", override)]
        error = cli("train", recipe(**sections), "--out", tmp_path / "runs", *options).error
        assert not (tmp_path / "runs").exists()
        return error

    return refuse


def test_a_tool_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr("opd_ray.metrics.find_spec", lambda name: None)
    assert refused("logging.wandb.project=p") == (
        "logging.wandb: the package wandb is not installed; pip install 'opd-ray[wandb]', or set logging.wandb=null"
    )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("studnet.guidance=2", ["recipe.yaml", "unknown key 'studnet' (did you mean 'student'?)", "allowed: name, "]),
        ("batch.item_sise=2", ["batch: unknown key 'item_sise' (did you mean 'item_size'?)"]),
        ("rounds=many", ["rounds: Input should be a valid integer", "got 'many'"]),
        ("teachers=[a, b]", ["teachers: Input should be a valid dictionary", "got ['a', 'b']"]),
        ("batch.item_size=3", ["batch.item_size 3 does not divide batch.images_per_task 2"]),
        ("algorithm.objective=kl", ["0 at noise_level 0; set algorithm.noise_level", "or objective: mean"]),
        (
            "algorithm.name=ppo",
            ["algorithm: unknown algorithm; known: opd, opd_ppo, ddpo, sdpo_stepwise, pso_pairwise"],
        ),
        ("algorithm.name=no.such:Thing", ["'no.such:Thing': cannot import 'no.such'", "Install it or put"]),
        ("rounds", ["-o rounds: expected key=value, for instance -o rounds=6"]),
        ("name.first=x", ["-o name.first=x: name is a value, not a section"]),
        ("rounds=[", ["-o rounds=[: '[' is not a YAML value"]),
        ("cluster=nowhere", ["no cluster file 'nowhere'; known: 8gpu, kuberay, local"]),
        (
            "teachers.c.lora=x",
            ["teacher 'c' serves task 'c', which has no training prompts", "has a, b. Add prompts or"],
        ),
        (
            "teachers.b.tasks=[z]",
            ["task 'b' of prompts.train has no teacher; teachers serve a, z", "Add it to a teacher"],
        ),
        ("teachers.b.tasks=[a]", ["task 'a' has two teachers, a and b; give it one"]),
        (
            "evaluation.rewards.b=[text]",
            ["held-out task 'b' is scored by 'text', which is not among rewards", "add it"],
        ),
        ("student.lora.targets=[attn.nope]", ["'student': targets attn.nope match no linear layer"]),
        ("teachers.a.lora=world/nope", ["world has no specialist 'nope'. Known: compose, text, look"]),
        ("prompts.eval=world/nope/heldout", ["world has no prompts nope/heldout. Known: compose/train"]),
        ("teachers.a.lora=/no/lora", ["LoRA 'a': '/no/lora': there is no such file or folder"]),
        ("model.path=/no/model", ["model '/no/model': there is no such file or folder"]),
        ("model.resolution=17", ["model.resolution 17 does not fit", "expected a multiple of 4 up to 48"]),
        (
            "cluster.rollout.resources={gpu: 1}",
            ["a role asks for a gpu, and this process sees none; set"],
        ),
        ("model.subfolder=inner", ["has no readable scheduler/scheduler_config.json"]),
    ],
)
def test_train(refused, override, parts):
    error = refused(override)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("p.jsonl", None, ["cannot be read (No such file or directory)"]),
        ("p.jsonl", "", ["has no prompts; expected at least one"]),
        ("p.jsonl", '{"prompt": "a cat"}', ["line 1 has no task; add a column task, or give one file for each task"]),
        ("p.jsonl", '{"prompt": "x", "task": "a"}\n{"prompt": " "}', ["line 2 has an empty prompt; give it a text"]),
        ("p.csv", "caption,task\na,b,c", ["line 2 has more cells than the header; put quotes around"]),
        ("p.docx", "a cat", ["unknown kind of file '.docx'; expected one of .txt, .csv, .jsonl, .parquet"]),
        ("p.txt", b"caf\xe9", ["line 1 is not UTF-8; save the file as UTF-8"]),
        ("p.parquet", "PAR", ["is not parquet"]),
    ],
)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_prompt_files(refused, files, tmp_path, which, file, content, parts):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts = {"train": str(files / "train.jsonl"), which: str(path)}
    error = refused(prompts=prompts)
    assert error.startswith(f"prompts.{which}: {path}: ")
    assert all(part in error for part in parts), error


@pytest.mark.parametrize("kind", ["other width", "half a pair", "no strength", "zero", "empty", "not safetensors"])
def test_loras(refused, tiny_teachers, tmp_path, kind):
    folder = tmp_path / "bad"
    shutil.copytree(tiny_teachers["a"], folder)
    file = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    down = sorted(key for key in tensors if "lora_A" in key)
    expected = {
        "other width": "It was made for another architecture",
        "half a pair": "would bind 44 of 45 tensors; the first of the others is 'transformer_blocks.0.",
        "no strength": "does not say its alpha, so its strength is unknown",
        "zero": "changes nothing: alpha, lora_A or lora_B are zero everywhere",
        "empty": "would bind 0 of 0 tensors",
        "not safetensors": "cannot be read",
    }
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    if kind == "other width":
        tensors |= {key: tensors[key][:, :7].contiguous() for key in down}
    elif kind == "half a pair":
        del tensors[down[0]]
    elif kind == "zero":
        tensors = {key: tensor * 0 for key, tensor in tensors.items()}
    elif kind == "empty":
        tensors = {}
    save_file(tensors, file, metadata=None if kind == "no strength" else header)
    if kind == "not safetensors":
        file.write_bytes(b"PK\x03\x04")
    error = refused(f"teachers.b.lora={folder}")
    assert f"LoRA 'b' ({file})" in error and expected[kind] in error, error


def test_a_rewards_arguments(refused):
    error = refused(rewards={BRIGHT: {"gain": 2}})
    assert error == f"rewards.{BRIGHT}: brightness takes no argument 'gain'; it takes images, prompts"


def test_a_model_of_another_kind(refused, tmp_path):
    model = make_tiny_sd3(tmp_path / "model")
    schedule = model / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"_class_name": "DDIMScheduler"}))
    assert "has scheduler DDIMScheduler with no option; only FlowMatch" in refused(model={"path": str(model)})


def test_the_recipe_itself(cli, tmp_path):
    refused = cli("train", "nope").error
    assert "no recipe 'nope'; known: demo, " in refused and refused.endswith(". Or give the path of a YAML file")
    assert cli("config", tmp_path / "missing.yaml").error == f"{tmp_path / 'missing.yaml'}: no such file"
    assert cli("config", "[red]two\nlines[/] :cat:.yaml").error == "[red]two lines[/] :cat:.yaml: no such file"
    for content, expected in [
        ("a: [", "not YAML: while parsing a flow node"),
        ("- a\n- b", "expected a mapping of sections, found list"),
        ("", "expected a mapping of sections, found NoneType"),
        ("name: x", "rounds is missing; model is missing"),
        ("1: x", "unknown key 1; allowed: name"),
    ]:
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        error = cli("config", path).error
        assert str(path) in error and expected in error


def test_a_section_that_is_off_can_be_switched_on(cli, recipe):
    shown = cli("config", recipe(), "--json", "-o", "ema=null", "-o", "ema.decay=0.5")
    assert json.loads(shown.out)["ema"] == {"decay": 0.5, "every": 8}


class TestFolders:
    def test_another_folder_is_left_alone(self, cli, recipe, tmp_path):
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "thesis.txt").write_text("precious")
        for resume in ([], ["--resume"]):
            error = cli("train", recipe(), "--out", tmp_path, *resume).error
            assert f"{tmp_path / 'small'} is not empty and has no run.json; choose another name" in error
        assert (tmp_path / "small" / "thesis.txt").read_text() == "precious"
        assert not (tmp_path / "small" / "run.json").exists()

    def test_a_run_that_is_there(self, cli, recipe, tmp_path):
        claim(tmp_path / "small", {})
        error = cli("train", recipe(), "--out", tmp_path).error
        assert "has a run already; go on with it by --resume or choose another name" in error

    def test_a_place_that_cannot_be_written(self, cli, recipe, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot be made (" in cli("train", recipe(), "--out", tmp_path / "file").error

    def test_the_demo_removes_no_other_run(self, cli, recipe, tmp_path):
        config = yaml.safe_load(recipe().read_text())
        claim(tmp_path / "mine", config)
        (tmp_path / "mine" / "lora").mkdir()
        error = cli("demo", "--out", tmp_path, "-o", "name=mine").error
        assert f"{tmp_path / 'mine'} holds another run than this demo (" in error and "move it away" in error
        (tmp_path / "demo").mkdir()
        assert "is there and is no run" in cli("demo", "--out", tmp_path).error
        assert (tmp_path / "mine" / "lora").is_dir() and (tmp_path / "demo").is_dir()

    def test_a_demo_that_cannot_start_keeps_the_last_one(self, cli, tmp_path):
        settings = ("-o", "model.path=./gone")
        claim(tmp_path / "demo", identity(load("demo", ["model.path=./gone"])))
        write_json_atomic(tmp_path / "demo" / "status.json", {"status": "done"})
        assert "model './gone'" in cli("demo", "--out", tmp_path, *settings).error
        assert (tmp_path / "demo" / "run.json").exists()

    def test_the_demo_removes_no_demo_of_other_settings(self, cli, tmp_path, no_start):
        claim(tmp_path / "demo", identity(load("demo", ["rounds=400"])))
        write_json_atomic(tmp_path / "demo" / "status.json", {"status": "done"})
        error = cli("demo", "--out", tmp_path).error
        assert "holds another run than this demo (rounds was 400, now 80); move it away" in error

    def test_a_demo_under_way_is_left_alone(self, cli, tmp_path, no_start):
        claim(tmp_path / "demo", identity(load("demo")))
        beat = {"status": "running", "pid": os.getpid(), "time": time.time()}
        write_json_atomic(tmp_path / "demo" / "status.json", beat)
        assert f"is being made by process {os.getpid()}; wait for it" in cli("demo", "--out", tmp_path).error

    @pytest.mark.parametrize("content", [None, "", "{}"])
    def test_report_of_what_is_no_run(self, cli, tmp_path, content):
        if content is not None:
            (tmp_path / "notes.md").write_text(content)
        assert (
            f"{tmp_path}: not a run folder (no run.json); run folders are runs/<name>" in cli("report", tmp_path).error
        )
        assert "not a run folder" in cli("report", tmp_path / "missing").error


class TestModels:
    """MODEL of `sample` and `evaluate`."""

    def test_workers_that_would_share_one_network(self, refused):
        shared = {"runtime": "local", "share_base": True}
        for role in ({"rollout": {"workers": 2}}, {"teachers": {"default": {"workers": 2}}}):
            assert "cluster.share_base: all roles are in one process; set" in refused(cluster=shared | role)
        assert "precision (bf16, fp32)" in refused(
            "precision={learner: bf16, rollout: fp32, teacher: fp32}", cluster=shared
        )

    def test_guidance_that_the_network_takes_as_an_input(self, refused, tiny, tmp_path):
        shutil.copytree(tiny, tmp_path / "distilled")
        file = tmp_path / "distilled" / "transformer" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": True}))
        error = refused(model={"path": str(tmp_path / "distilled")})
        assert "takes guidance as an input of its network" in error

    @pytest.mark.parametrize("verb", ["sample", "evaluate"])
    def test_what_is_no_model(self, cli, tmp_path, verb):
        rest = ["-p", "a cat", "--out", tmp_path / "out"] if verb == "sample" else []
        (tmp_path / "empty").mkdir()
        claim(tmp_path / "unfinished", {})
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora" / FILE).touch()
        for model, expected in [
            ("/no/model", "model '/no/model': there is no such file or folder, and it is no hub id (owner/name)"),
            (tmp_path / "empty", "is no diffusers folder and no run folder; there is neither model_index.json nor"),
            (tmp_path, "is no diffusers folder and no run folder; its runs are unfinished"),
            (tmp_path / "lora", f"is a LoRA without its base; give its run folder, for instance {tmp_path}"),
            (tmp_path / "lora" / FILE, "is a file; give a diffusers folder, a hub id or a run folder"),
            ("world/nope", "world has no specialist 'nope'. Known: compose, text, look"),
            (
                tmp_path / "unfinished",
                "has no lora/pytorch_lora_weights.safetensors, transformer/config.json or unet/config.json yet; let",
            ),
            (tmp_path / "unfinnished", f"no such run; {tmp_path} has unfinished"),
        ]:
            assert expected in cli(verb, model, *rest).error
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("text", "expected"), [(None, "cannot be read"), ("a: [", "not YAML"), ("{}", "is missing")]
    )
    def test_a_run_whose_configuration_is_broken(self, cli, tiny_teachers, tmp_path, text, expected):
        claim(tmp_path / "run", {})
        shutil.copytree(tiny_teachers["a"], tmp_path / "run" / "lora")
        if text is not None:
            (tmp_path / "run" / "config.yaml").write_text(text)
        error = cli("sample", tmp_path / "run", "-p", "x").error
        assert str(tmp_path / "run" / "config.yaml") in error and expected in error

    def test_sample(self, cli, tiny, tmp_path):
        assert "--prompt is empty; say what to draw" in cli("sample", tiny, "-p", "a cat", "-p", " ").error
        assert "--guidance nan: expected a number" in cli("sample", tiny, "-p", "x", "--guidance", "nan").error
        (tmp_path / "file").write_text("")
        assert (
            f"--out: {tmp_path / 'file'} cannot be made"
            in cli("sample", tiny, "-p", "x", "--out", tmp_path / "file").error
        )

    def test_evaluate(self, cli, tiny, tmp_path):
        for guidance, expected in [
            ("strong", "--guidance strong: expected a number from 0 on, or MODEL=number"),
            ("-1", "--guidance -1: expected a number"),
            ("world=2", f"--guidance world=2: world is not among the models {tiny}"),
        ]:
            assert expected in cli("evaluate", tiny, "--guidance", guidance).error
        assert f"{tmp_path} is a folder; name a JSON file" in cli("evaluate", tiny, "--out", tmp_path).error
        assert "--steps 4,many: 'many' is no number from 1 to" in cli("evaluate", tiny, "--steps", "4,many").error
        (tmp_path / "file").write_text("")
        assert "cannot be made" in cli("evaluate", tiny, "--out", tmp_path / "file" / "scores.json").error


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["train"],
        ["train", "demo", "--nope"],
        ["train", "demo", "extra"],
        ["train", "demo", "-o"],
        ["train", "demo", "--seed", "x"],
        ["demo", "extra"],
        ["sample", "world"],
        ["sample", "world", "-p", "x", "--count", "0"],
        ["sample", "world", "-p", "x", "--seed", "-1"],
        ["evaluate"],
        ["evaluate", "world", "--images", "0"],
        ["evaluate", "world", "--images-per-prompt", "0"],
        ["score"],
        ["config"],
        ["config", "demo", "--schema"],
        ["report"],
        ["report", "a", "b"],
    ],
)
def test_wrong_arguments(cli, args):
    done = cli(*args)
    assert done.code == 2 and done.out == "" and "Error" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("verb", ["demo", "train", "sample", "evaluate", "score", "config", "report", "doctor"])
def test_every_verb_explains_itself(cli, verb):
    done = cli(verb, "--help")
    assert done.code == 0 and "Usage: opd-ray" in done.out and done.err == ""
    assert max(map(len, done.out.splitlines())) <= 80
