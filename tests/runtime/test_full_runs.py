"""Whole runs that train every weight of the denoiser, in this process."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from opd_ray.config import Config, ModelConfig
from opd_ray.digest import digest
from opd_ray.errors import ConfigError, ModelError, RunFolderError
from opd_ray.evaluation.models import find_model
from opd_ray.models import load_family
from opd_ray.preflight import check_whole
from opd_ray.storage import checkpoint
from tests.algorithms.parts import item, random_experience
from tests.evaluation.scoring import __name__ as SCORING
from tests.models.tiny_sd3 import make_tiny_sd3
from tests.runtime.runs import go, same

FULL = {"student": {"guidance": 2.0, "lora": None}, "ema": {"decay": 0.5, "every": 1}}


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run"
    return folder, go(make_config(**FULL), folder)


def test_what_was_trained_is_a_transformer_that_diffusers_loads(whole, tiny):
    folder, outcome = whole
    written = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    weights = {name: parameter.data for name, parameter in written.named_parameters()}
    assert digest(weights) == outcome.result["ema_sha256"] != outcome.result["student_sha256"]
    base = load_family(ModelConfig(path=str(tiny)), text=False, image=False).network
    assert all(not torch.equal(weights[name], before) for name, before in base.named_parameters())
    assert torch.equal(written.pos_embed.pos_embed, base.pos_embed.pos_embed)
    assert not (folder / "lora").exists()
    card = (folder / "transformer" / "README.md").read_text()
    assert "transformer=transformer" in card and "lora" not in card.partition("## Teachers")[0]


def test_going_on_from_a_checkpoint_is_the_same_run(whole, make_config, tmp_path):
    folder, outcome = whole
    go(make_config(**FULL, rounds=2), tmp_path / "run")
    resumed = go(make_config(**FULL), tmp_path / "run", resume=True)
    assert same(resumed, outcome)
    saved, _ = checkpoint.newest(folder)
    assert digest(saved.tensors["student"]) == outcome.result["student_sha256"]
    assert saved.tensors["student"].keys() == saved.tensors["ema"].keys()


def test_the_run_is_a_model_to_draw_with(whole):
    folder, _ = whole
    found = find_model(str(folder))
    assert found.lora is None and found.guidance == 2.0
    family = found.load()
    file = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(parameter, file[name]) for name, parameter in family.network.named_parameters())
    (folder / "transformer" / "config.json").rename(folder / "aside.json")
    try:
        with pytest.raises(RunFolderError, match=r"transformer/config\.json or unet/config\.json yet"):
            find_model(str(folder))
    finally:
        (folder / "aside.json").rename(folder / "transformer" / "config.json")


def test_a_transformer_of_another_shape_is_refused_and_nothing_of_it_taken(whole, tmp_path):
    other = load_family(ModelConfig(path=str(make_tiny_sd3(tmp_path / "wide", width=48))), text=False, image=False)
    before = digest(dict(other.network.named_parameters()))
    with pytest.raises(ModelError, match=r"the denoiser in .* does not fit model .* of another shape"):
        other.load_own(whole[0] / "transformer")
    assert digest(dict(other.network.named_parameters())) == before


def test_base_and_teachers_are_drawn_as_they_are_under_a_lora(make_config, prompts, tmp_path):
    """The student has taken the base's place in the rollout's own network."""
    reward = f"{SCORING}:brightness"
    shown = {
        "prompts": {"train": str(prompts), "eval": str(prompts)},
        "evaluation": {"images_per_task": 2, "steps": 2, "batch": 2, "rewards": {"a": (reward,), "b": (reward,)}},
        "rewards": {reward: {}},
        "rounds": 1,
    }
    full, lora = (
        go(make_config(**shown, **changes), tmp_path / name).result["scores"]
        for name, changes in (("full", FULL), ("lora", {}))
    )
    for model in ("base", "teacher:a", "teacher:b"):
        assert full[model] == lora[model], model
    assert full["student"] != lora["student"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_stay_in_float32_whatever_is_computed_in(make_config, whole, tmp_path, precision):
    half = go(make_config(**FULL, rounds=1, precision=precision), tmp_path / "run")
    file = load_file(tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in file.values()} == {torch.float32}
    assert half.rows[0]["loss"] == pytest.approx(whole[1].rows[0]["loss"], rel=0.5), (
        "teachers are so near that rounding shows"
    )
    assert any(not torch.equal(t, t.bfloat16().float()) for t in file.values()), "not rounded on the way"


def test_one_network_has_no_second_copy_of_its_weights(make_config, tiny):
    with pytest.raises(ValueError, match=r"cluster.share_base: student.lora null trains the base itself"):
        make_config(**FULL, cluster={"share_base": True, "share_teachers": True})
    config: Config = make_config(**FULL)

    class Comparing:
        adapters, velocities = ("old",), ("old", "reference")

    with pytest.raises(ConfigError, match=r"one copy, and algorithm opd also needs old, reference; train a LoRA"):
        check_whole(config, Comparing())
    check_whole(make_config(), Comparing())
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    family.add_own("student")
    with pytest.raises(ModelError, match=r"LoRA 'a': this network's own weights are student's"):
        family.add_lora("a", make_config().student.lora, 0)
    with pytest.raises(ModelError, match=r"'other': all weights of the network cannot be trained beside student"):
        family.add_own("other")


def test_own_weights_answer_as_the_base_until_they_are_trained(tiny):
    plain, own = (load_family(ModelConfig(path=str(tiny)), text=False, image=False) for _ in range(2))
    own.add_own("student")
    own.use("student")
    own.train_adapter("student")
    assert list(own.adapter_parameters("student")) == sorted(name for name, _ in own.network.named_parameters())
    path = random_experience(plain, item()).trajectory
    arguments = (path.state(1), 0.5, path.cond, path.uncond, 1.5)
    assert torch.equal(own.velocity(*arguments).detach(), plain.velocity(*arguments))
    with own.adapter(None):
        assert all(parameter.requires_grad for parameter in own.network.parameters())
