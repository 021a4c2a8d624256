"""Teachers as full checkpoints: what has to agree with the student's base, whose text encoders, what they answer."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from opd_ray.algorithms import make_algorithm
from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError
from opd_ray.models import load_family
from opd_ray.models.teachers import checkpoint_sha256, same_text
from opd_ray.preflight import preflight
from opd_ray.roles import make_teacher
from tests.algorithms.parts import item, random_experience
from tests.models.tiny_sd3 import make_tiny_sd3
from tests.runtime.runs import go

BRIGHT = "tests.commands.scoring:brightness"


@pytest.fixture(scope="module")
def merged(tiny, tiny_teachers, tmp_path_factory):
    """The base with teacher a's LoRA merged into its weights: what a LoRA teacher is, as a full checkpoint."""
    folder = tmp_path_factory.mktemp("merged") / "sd3"
    shutil.copytree(tiny, folder)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny)
    pipe.load_lora_weights(tiny_teachers["a"])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def copy(merged, tmp_path):
    return shutil.copytree(merged, tmp_path / "copy")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def config_of(make_config, tiny_teachers):
    """A run whose teacher a is a checkpoint and whose teacher b is a LoRA."""

    def make(folder, **changes):
        teachers = {
            "a": {"model": str(folder), "guidance": 2.0},
            "b": {"lora": str(tiny_teachers["b"]), "guidance": 2.0},
        }
        return make_config(teachers=teachers, **changes)

    return make


def path_of(family):
    return random_experience(family, item(steps=(0, 2))).trajectory


def test_a_merged_checkpoint_answers_as_its_lora(make_config, config_of, merged):
    ours, theirs = make_teacher(config_of(merged), ("a", "b")), make_teacher(make_config(), ("a",))
    path = path_of(theirs.families["a"])
    object.__setattr__(theirs.facts["a"], "guidance", 2.0)
    answer, expected = ours.score(path, "a"), theirs.score(path, "a")
    assert torch.allclose(answer.velocity, expected.velocity, atol=1e-5)
    assert not torch.allclose(answer.velocity, ours.score(path, "b").velocity, atol=1e-3)
    facts = ours.facts["a"]
    assert (facts.path, facts.lora, facts.own_text, len(facts.sha256)) == (str(merged), None, False, 64)
    assert ours.forwards == 2 * (2 * 2 * 2), "two answers of 2 guided rows at 2 steps"


def test_its_hash_is_that_of_its_files_in_any_number_format(config_of, merged, copy):
    hashes = {make_teacher(config_of(copy, precision=form), ("a",)).facts["a"].sha256 for form in ("fp32", "bf16")}
    assert hashes == {checkpoint_sha256(ModelConfig(path=str(merged)))}
    (file,) = (copy / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    assert checkpoint_sha256(ModelConfig(path=str(copy))) not in hashes


def test_its_own_text_encoders_read_the_prompts(config_of, tiny, copy, tmp_path):
    student, teacher = ModelConfig(path=str(tiny)), ModelConfig(path=str(copy))
    assert same_text(student, teacher)
    other = make_tiny_sd3(tmp_path / "other", seed=1)
    shutil.rmtree(copy / "text_encoder_3")
    shutil.copytree(other / "text_encoder_3", copy / "text_encoder_3")
    assert not same_text(student, teacher)
    actor = make_teacher(config_of(copy), ("a",))
    assert actor.facts["a"].own_text
    whole = load_family(teacher, text=True, image=False)
    path = path_of(whole)
    cond, empty = whole.encode([prompt.text for prompt in path.item.prompts]), whole.encode([""])
    with torch.no_grad():
        expected = whole.velocity(path.latents[:, 2], float(path.sigmas[2]), cond, empty, 2.0)
    assert torch.equal(actor.score(path, "a").velocity[:, 1], expected)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vae/config.json", {"scaling_factor": 0.5}, "VAE scaling factor is 0.5, the student's 1.5305"),
        ("vae/config.json", {"latent_channels": 4}, "latent channels is 4, the student's 16"),
        ("scheduler/scheduler_config.json", {"shift": 1.0}, "shift is 1.0, the student's 3.0"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "has scheduler DDIMScheduler"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline"),
    ],
)
def test_another_latent_space_or_schedule_is_refused_before_anything_is_loaded(config_of, copy, file, change, message):
    edit(copy / file, **change)
    config = config_of(copy)
    with pytest.raises(ModelError) as caught:
        preflight(config, make_algorithm(config))
    assert message in str(caught.value) and str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_one_that_equals_the_student_is_allowed_and_said(config_of, tiny, prompts, tmp_path):
    settings = {
        "rounds": 1,
        "prompts": {"train": str(prompts), "eval": str(prompts)},
        "rewards": {BRIGHT: {}},
        "evaluation": {"images_per_task": 2, "steps": 2, "rewards": {"a": [BRIGHT], "b": [BRIGHT]}},
    }
    done = go(config_of(tiny, **settings), tmp_path / "run")
    assert [note for note in done.notes if "teacher a answers a exactly as the student does" in note]
    assert not [note for note in done.notes if "teacher b" in note]
    assert done.rows[0]["loss"]["a"] == 0 < done.rows[0]["loss"]["b"]
    scores = done.result["scores"]
    assert scores["teacher:a"]["a"] == scores["base"]["a"] != scores["teacher:b"]["a"]


def test_its_pictures_are_those_of_its_own_pipeline(config_of, merged, prompts, tmp_path):
    settings = {
        "rounds": 1,
        "prompts": {"train": str(prompts), "eval": str(prompts)},
        "rewards": {BRIGHT: {}},
        "evaluation": {"images_per_task": 2, "steps": 2, "rewards": {"a": [BRIGHT], "b": [BRIGHT]}},
    }
    done = go(config_of(merged, **settings), tmp_path / "run")
    scores = done.result["scores"]
    assert scores["teacher:a"]["a"] != scores["base"]["a"]
    assert done.result["forwards"]["evaluation"] == 2 * 2 * 2 * 2 * 4, "tasks, pictures, steps, guidance, models"
