"""LoRAs over U-Nets: written so that stock diffusers loads them, and read as its scripts write them."""

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file

from opd_ray.config import LoraConfig, ModelConfig, TeacherConfig
from opd_ray.errors import ModelError
from opd_ray.models import check_adapters, load_family
from tests.models.conftest import fill
from tests.models.tiny_unet import make_tiny_sd, make_tiny_sdxl

PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
FILE = "pytorch_lora_weights.safetensors"
ENDINGS = ["to_k", "to_out.0", "to_q", "to_v"]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request, tmp_path_factory):
    make = {"sd": make_tiny_sd, "sdxl": make_tiny_sdxl}[request.param]
    return ModelConfig(family=request.param, path=str(make(tmp_path_factory.mktemp("tiny") / request.param)))


@pytest.fixture
def family(model):
    return load_family(model, text=False, image=False)


@pytest.fixture
def saved(family, tmp_path):
    """A folder with an adapter of alpha 16 and rank 4, which stays in use."""
    family.add_lora("student", LoraConfig(rank=4, alpha=16), seed=0)
    fill(family, "student")
    family.save_lora("student", tmp_path / "saved")
    family.use("student")
    return tmp_path / "saved"


def raw(unet, family):
    """The network's answer at fixed inputs."""
    x = torch.randn((2, *family.latent_shape), generator=torch.Generator().manual_seed(1))
    cond = family.random_conditioning(torch.Generator().manual_seed(2))
    more = {"time_ids": torch.ones(2, 6), "text_embeds": cond["text_embeds"].expand(2, -1)} if len(cond) > 1 else {}
    states = cond["encoder_hidden_states"].expand(2, -1, -1)
    with torch.no_grad():
        return unet(x, 400, states, added_cond_kwargs=more, return_dict=False)[0]


def stock(model):
    return PIPELINES[model.family].from_pretrained(model.path)


def test_a_fresh_adapter_is_on_every_projection_of_both_attentions(family):
    family.add_lora("student", LoraConfig(rank=4, alpha=16), seed=0)
    modules = {name.rsplit(".lora_", 1)[0] for name in family.adapter_parameters("student")}
    assert modules == {
        name
        for name, module in UNet2DConditionModel.from_pretrained(f"{family.model.path}/unet").named_modules()
        if isinstance(module, torch.nn.Linear) and (".attn1.to_" in name or ".attn2.to_" in name)
    }
    assert sorted({name.partition(".attn1.")[2] for name in modules} - {""}) == ENDINGS


def test_stock_diffusers_loads_it_at_full_strength(model, family, saved):
    expected = raw(family.network, family)
    pipeline = stock(model)
    base = raw(pipeline.unet, family)
    pipeline.load_lora_weights(saved)
    assert torch.allclose(raw(pipeline.unet, family), expected, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)
    assert all(key.startswith("unet.") for key in load_file(saved / FILE))


def test_stock_peft_loads_the_peft_folder(model, family, saved):
    expected = raw(family.network, family)
    unet = peft.PeftModel.from_pretrained(stock(model).unet, saved / "peft")
    assert torch.allclose(raw(unet, family), expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["ours", "peft", "older", "convolutions"])
def test_teachers_come_in_every_layout(model, family, tmp_path, layout):
    """Ours and PEFT's; diffusers' training scripts', whose endings are older; one that also adapts convolutions."""
    targets = [*ENDINGS, *(["conv1", "conv_shortcut"] if layout == "convolutions" else [])]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    pipeline = stock(model)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(config)
    expected = raw(pipeline.unet, family)
    layers = peft.get_peft_model_state_dict(pipeline.unet)
    if layout == "peft":
        made = peft.get_peft_model(stock(model).unet, config)
        expected = raw(made, family)
        made.save_pretrained(tmp_path / "lora")
    else:
        PIPELINES[model.family].save_lora_weights(
            tmp_path / "lora",
            unet_lora_layers=convert_state_dict_to_diffusers(layers) if layout == "older" else layers,
            unet_lora_adapter_metadata=config.to_dict(),
        )
    if layout == "older":
        assert any(key.endswith(".lora.down.weight") for key in load_file(tmp_path / "lora" / FILE))
    info = family.load_lora("teacher", str(tmp_path / "lora"))
    assert (info.rank, info.alpha, info.tensors) == (4, 8, len(layers))
    family.use("teacher")
    assert torch.allclose(raw(family.network, family), expected, atol=1e-5)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(model, family, saved, tiny_teachers):
    check_adapters(model, LoraConfig(), {"a": TeacherConfig(lora=str(saved))})
    with pytest.raises(ModelError, match=r"LoRA 'a' .* binds 0 of \d+ tensors: it adapts a transformer .* has a unet"):
        check_adapters(model, None, {"a": TeacherConfig(lora=str(tiny_teachers["a"]))})
    with pytest.raises(ModelError, match=r"targets attn.to_q match no linear layer; endings here: .*to_q"):
        check_adapters(model, LoraConfig(targets=("attn.to_q",)), {})
