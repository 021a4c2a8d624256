"""The model card: what a hub reads of it, that its own words load the LoRA, and that nobody's text becomes Markdown."""

import json
import re

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from markdown_it import MarkdownIt

from opd_ray.actors.rollout import SampleRequest, draw_pictures
from opd_ray.config import Config, ModelConfig
from opd_ray.errors import RunFolderError
from opd_ray.models import load_family
from opd_ray.report.card import card, write_card
from opd_ray.report.run_folder import RunFolder
from opd_ray.seeds import fold, noise
from opd_ray.types import Prompt
from tests.models.tiny_unet import BETAS, make_tiny_sdxl, turbo_scheduler
from tests.report.run_folders import result, write_run

HOSTILE = "a|b <script>alert(1)</script>\n# [x](http://evil) `c` ![i](j) **&amp;**"


def settings(**changes) -> dict:
    """What config.yaml holds: every default filled in."""
    told = {
        "name": "mine",
        "rounds": 80,
        "prompts": {"train": "prompts.jsonl"},
        "model": {"path": "team/sd3", "revision": "v1"},
        "algorithm": {"name": "opd", "objective": "mean", "loss_target": "v"},
        "teachers": {
            "text": {"lora": "team/loras", "subfolder": "OCRTeacher/lora", "guidance": 4.5, "tasks": ["text"]},
            "look": {"lora": "/home/someone/secret/AesTeacher", "guidance": 1.0, "tasks": ["look"]},
        },
    }
    return Config.model_validate(told | changes).model_dump(mode="json")


@pytest.fixture
def written(tmp_path):
    """Writes a run with its card, and returns the card's text."""

    def write(config=None, told=None, **facts) -> str:
        run = write_run(tmp_path / "run", rounds=2)
        (run / "lora").mkdir(exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config or settings()))
        (run / "result.json").write_text(json.dumps(result() if told is None else told))
        teachers = {
            name: {"path": f"/cache/{name}", "sha256": sha * 32} for name, sha in (("text", "ab"), ("look", "cd"))
        }
        (run / "run.json").write_text(json.dumps({"teachers": teachers, "versions": {"torch": "2.15.0"}} | facts))
        assert write_card(run) == run / "lora" / "README.md"
        assert [file.name for file in (run / "lora").iterdir()] == ["README.md"]
        return (run / "lora" / "README.md").read_text()

    return write


def front_matter(text) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def html(text) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(text.split("---\n", 2)[2])


def test_what_a_hub_reads(written):
    text = written()
    assert front_matter(text) == {
        "base_model": "team/sd3",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "diffusers", "opd-ray"],
    }
    assert "# license: yours to choose" in text  # and not ours


def test_what_a_reader_is_told(written):
    text = re.sub("<[^>]*>", " ", html(written()))
    for part in (
        f"text   text   team/loras, OCRTeacher/lora   4.5   {'ab' * 32}",
        f"look   look   AesTeacher   1.0   {'cd' * 32}",
        "base: team/sd3, revision v1",
        "trained: 80 rounds",
        f"weights: averaged over steps (decay 0.9, every 8; sha256 {'a7' * 32})",
        "student: guidance 4.5, steps 10",
        "loss_target v",
        "LoRA: rank 32, alpha 64",
        "student   0.838 (0.807 to 0.867)",
        "text teacher   0.262",
        "gap closed   94 % (87 % to 101 %)   97 % (93 % to 100 %)   91 % (85 % to 97 %)   –",  # noqa: RUF001
        "from 64 images a task in 10 steps with seed 7",
        "torch 2.15.0",
    ):
        assert part in re.sub(r"\s*\n\s*", "   ", text), part
    assert "/home/someone" not in text and "/cache" not in text


def test_a_run_without_scores_average_or_teachers_says_so(written):
    told = {"status": "done", "rounds": 3, "student_sha256": "5f" * 32, "ema_sha256": None, "scores": {}}
    text = written(settings() | {"teachers": {}, "ema": None}, told)
    assert "The run was not evaluated." in text
    assert "teacher" not in text.partition("## Settings")[0].lower()
    assert f"raw, as of the last step (sha256 {'5f' * 32})" in text
    same = {**told, "ema_sha256": "5f" * 32}  # ema is on, and its first average was never due
    assert "raw, as of the last step" in written(settings() | {"teachers": {}}, same)


@pytest.mark.parametrize("path", ["/home/someone/models/sd3", "world"])
def test_a_base_that_is_on_no_hub_is_left_to_the_user(written, path):
    text = written(settings(model={"path": path}))
    assert "base_model" not in front_matter(text)
    assert f'# base_model: the hub id of the base, which was "{path.rpartition("/")[2]}" here' in text
    assert "/home/someone" not in text


def test_nobodys_text_becomes_markdown(written):
    told = result()
    for by_task in (*told["scores"].values(), told["gap_closed"]):
        by_task[HOSTILE] = by_task.pop("text")
    teachers = {"look": {"lora": HOSTILE, "guidance": 1.0, "tasks": [HOSTILE]}}
    config = settings() | {"name": HOSTILE, "teachers": teachers, "model": {"path": HOSTILE}}
    text = written(config, told, versions={HOSTILE: HOSTILE})
    assert front_matter(text)["base_model"] == HOSTILE
    shown = html(text)
    plain = html(written())
    for tag in ("script", "a ", "img", "h1", "h2", "code", "strong", "td", "th"):
        assert shown.count(f"<{tag}") <= plain.count(f"<{tag}"), tag
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(snippet, "card", "exec")


def test_the_cards_own_words_load_it_in_stock_diffusers(tiny, tiny_teachers, tmp_path, written):
    """Alpha is twice the rank: a strength that diffusers would lose without the adapter's metadata."""
    text = written(settings(model={"path": str(tiny), "max_sequence_length": 32}))
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    family.load_lora("student", str(tiny_teachers["a"]))
    family.save_lora("student", tmp_path / "run" / "lora")
    assert (tmp_path / "run" / "lora" / "README.md").read_text() == text
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    snippet = snippet.replace("path/to/lora", str(tmp_path / "run" / "lora")).replace("path/to/sd3", str(tiny))
    names = {}
    exec(snippet.replace("num_inference_steps=40", "num_inference_steps=1, height=16, width=16"), names)
    assert names["image"].size == (16, 16)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    noise = family.random_conditioning(torch.Generator().manual_seed(1))
    cond = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in noise.items()}
    with torch.no_grad():
        theirs = names["pipe"].transformer(x, timestep=torch.full((2,), 700.0), return_dict=False, **cond)[0]
        base = family.velocity(x, 0.7, cond, {}, 1)
        family.use("student")
        ours = family.velocity(x, 0.7, cond, {}, 1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(base, theirs, atol=1e-2)


def test_the_built_in_worlds_snippet_loads_its_base(written):
    text = written(settings(model={"path": "world"}))
    (snippet,) = re.findall(r"```python\n(.*?)pipe.load_lora", text, re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["pipe"].text_encoder_3 is None


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunFolderError, match="no such run folder"):
        write_card(tmp_path / "nothing")


def test_a_broken_run_folder_still_gets_a_card(tmp_path):
    (tmp_path / "lora").mkdir()
    assert "The run was not evaluated." in card(RunFolder.read(tmp_path))


SDXL_OWN = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)


@pytest.mark.parametrize(
    ("name", "changes", "scheduler"),
    [
        ("turbo", {}, turbo_scheduler()),
        ("dmd2", {"spacing": "trailing"}, LCMScheduler.from_config(SDXL_OWN.config)),
        ("own", {}, SDXL_OWN),
        ("ddim", {"spacing": "trailing"}, DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)),
    ],
)
def test_the_cards_words_draw_what_the_run_draws(written, tmp_path, name, changes, scheduler):
    """By the ODE, from the first state to the end that the run's pictures have. Files have DDIM's options left over."""
    folder = make_tiny_sdxl(tmp_path / name, scheduler=scheduler)
    left_over = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | {"set_alpha_to_one": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(left_over))
    model = {"family": "sdxl", "path": str(folder), **changes}
    text = written(settings(model=model, evaluation={"steps": 4}, student={"guidance": 1.0}))
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    loading = snippet.partition("pipe.load_lora_weights")[0].replace(f"path/to/{name}", str(folder))
    names: dict = {}
    exec(loading, names)
    family = load_family(ModelConfig(**model), text=True, image=True)
    prompt = Prompt("a red cat", "a red cat", "")
    ours = draw_pictures(family, SampleRequest("", None, 1.0, 4, 3, (prompt,), (0,)))
    first = noise([fold(3, "eval", prompt.id, 0)], family.latent_shape)
    names["pipe"].set_progress_bar_config(disable=True)
    theirs = names["pipe"](
        "a red cat",
        latents=first,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="pt",
        height=16,
        width=16,
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_four_step_models_card_loads_its_base(written):
    text = written(settings(model={"family": "sd", "path": "world/few"}, evaluation={"steps": 4}))
    (snippet,) = re.findall(r"```python\n(.*?)pipe.load_lora", text, re.DOTALL)
    assert 'world.pipeline_path("few"), safety_checker=None' in snippet
    names: dict = {}
    exec(snippet, names)
    assert type(names["pipe"].scheduler).__name__ == "EulerDiscreteScheduler"
    names["pipe"].scheduler.set_timesteps(4)
    assert names["pipe"].scheduler.timesteps.tolist() == [999, 749, 499, 249]
