"""LoRA files: stock diffusers and stock PEFT read ours, we read theirs, and what is refused."""

import hashlib
import json
import re

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opd_ray.config import ATTENTION, LoraConfig, ModelConfig, TeacherConfig
from opd_ray.errors import ModelError
from opd_ray.models import check_adapters, load_family
from tests.models.conftest import fill
from tests.models.tiny_sd3 import make_tiny_sd3

FILE = "pytorch_lora_weights.safetensors"
Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture
def saved(trained, tmp_path):
    """The folder of a LoRA with alpha 16 and rank 4, saved by us."""
    trained.save_lora("student", tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def expected(trained, answer):
    with trained.adapter("student"):
        return answer(trained)


def header(file):
    with safe_open(file, framework="pt") as content:
        return content.metadata()


def rewrite(folder, change, metadata=None):
    """Change the tensors of a saved file; the header stays unless one is given."""
    file = folder / FILE
    kept = header(file)
    save_file(change(load_file(file)), file, metadata=kept if metadata is None else metadata)


def raw(transformer, batch):
    x, cond, _ = batch
    with torch.no_grad():
        t = torch.full((2,), 700.0)
        return transformer(x, timestep=t, return_dict=False, **cond)[0]


def test_stock_diffusers_loads_it_at_full_strength(tiny, saved, expected, batch, family):
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny)
    base = raw(pipeline.transformer, batch)
    pipeline.load_lora_weights(saved)
    assert torch.allclose(raw(pipeline.transformer, batch), expected, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)


def test_stock_peft_loads_the_peft_folder(tiny, saved, expected, batch):
    transformer = SD3Transformer2DModel.from_pretrained(tiny / "transformer")
    model = peft.PeftModel.from_pretrained(transformer, saved / "peft")
    assert torch.allclose(raw(model, batch), expected, atol=1e-5)
    assert load_file(saved / "peft" / "adapter_model.safetensors").keys() == {
        key.replace("transformer.", "base_model.model.", 1) for key in load_file(saved / FILE)
    }


@pytest.mark.parametrize("subfolder", [None, "peft"])
def test_ours_loads_both_layouts_frozen(tiny, saved, expected, answer, subfolder):
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    state = torch.get_rng_state()
    info = family.load_lora("text", str(saved), subfolder=subfolder)
    assert torch.equal(torch.get_rng_state(), state)
    assert (info.name, info.tensors, info.rank, info.alpha) == ("text", 46, 4, 16)
    with open(info.path, "rb") as stream:
        assert info.sha256 == hashlib.sha256(stream.read()).hexdigest()
    assert not any(p.requires_grad for p in family.network.parameters())
    family.use("text")
    assert torch.allclose(answer(family), expected, atol=1e-5)


def test_a_file_may_have_any_name_and_any_dtype(family, saved, expected, answer):
    def halve(tensors):
        return {key: tensor.half() for key, tensor in tensors.items()}

    rewrite(saved, halve)
    (saved / FILE).rename(saved / "mine.safetensors")
    for name, path in (("file", saved / "mine.safetensors"), ("folder", saved)):
        family.load_lora(name, str(path))
        assert {p.dtype for p in family.adapter_parameters(name).values()} == {torch.float32}
        family.use(name)
        assert torch.allclose(answer(family), expected, atol=1e-2)


@pytest.mark.parametrize("rslora", [False, True])
def test_every_layout_has_the_strength_that_stock_peft_gives_it(tiny, tmp_path, family, batch, answer, rslora):
    """Ranks and alphas of single modules, and rsLoRA's alpha / sqrt(rank)."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["attn.to_q", "attn.to_k"],
        rank_pattern={"transformer_blocks.0.attn.to_q": 2},
        alpha_pattern={"transformer_blocks.0.attn.to_q": 30, "attn.to_k": 7},
        init_lora_weights=False,
        use_rslora=rslora,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(SD3Transformer2DModel.from_pretrained(tiny / "transformer"), config)
    theirs = raw(model, batch)
    model.save_pretrained(tmp_path / "peft")
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / "diffusers",
        transformer_lora_layers=peft.get_peft_model_state_dict(model.get_base_model(), adapter_name="default"),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    for layout in ("peft", "diffusers"):
        info = family.load_lora(layout, str(tmp_path / layout))
        assert (info.rank, info.alpha, info.tensors) == (4, 16, 12)
        family.use(layout)
        assert torch.allclose(answer(family), theirs, atol=1e-5)
        family.save_lora(layout, tmp_path / f"{layout} again")
        for again in ("", "peft"):  # what we write of what we read
            family.load_lora(f"{layout} {again}", str(tmp_path / f"{layout} again"), subfolder=again or None)
            family.use(f"{layout} {again}")
            assert torch.allclose(answer(family), theirs, atol=1e-5)
    plain = SD3Transformer2DModel.from_pretrained(tiny / "transformer")
    assert not torch.allclose(raw(plain, batch), theirs, atol=1e-2)


def test_alpha_may_stand_beside_each_module(family, saved, trained, answer):
    q = Q.removeprefix("transformer.")

    def with_alphas(tensors):
        modules = {key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key}
        alphas = {f"{module}.alpha": torch.tensor(16.0) for module in modules}
        return {**tensors, **alphas, f"{Q}.alpha": torch.tensor(8.0)}

    rewrite(saved, with_alphas, metadata={"format": "pt"})
    info = family.load_lora("text", str(saved))
    assert (info.tensors, info.rank, info.alpha) == (46, 4, 16)
    family.use("text")
    with torch.no_grad():  # half the alpha is half of B
        trained.adapter_parameters("student")[f"{q}.lora_B.weight"].mul_(0.5)
    trained.use("student")
    assert torch.allclose(answer(family), answer(trained), atol=1e-5)


def test_averaged_weights_are_saved_instead_of_the_live_ones(trained, tmp_path):
    live = trained.adapter_parameters("student")
    average = {name: 2 * p.detach() for name, p in live.items()}
    trained.save_lora("student", tmp_path, weights=average)
    stored = load_file(tmp_path / FILE)
    assert all(torch.equal(stored[f"transformer.{name}"], 2 * live[name]) for name in live)
    del average["transformer_blocks.0.attn.to_q.lora_A.weight"]
    with pytest.raises(ValueError, match=r"name or shape: transformer_blocks.0.attn.to_q"):
        trained.save_lora("student", tmp_path, weights=average)


def test_the_same_adapter_is_the_same_file(trained, tmp_path):
    """To the byte where safetensors has an order; its header of two keys has none."""
    for folder in ("a", "b"):
        trained.save_lora("student", tmp_path / folder)
    for file in ("peft/adapter_model.safetensors", "peft/adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert header(tmp_path / "a" / FILE) == header(tmp_path / "b" / FILE)
    config = json.loads((tmp_path / "a" / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_weights_of_the_base_are_never_touched_by_a_files_metadata(trained, tmp_path, family):
    """PEFT would run an initialisation such as PiSSA, which rewrites the base, before it binds."""
    trained.save_lora("student", tmp_path)
    file = tmp_path / FILE
    kept = header(file)
    packed = json.loads(kept["lora_adapter_metadata"])
    packed["transformer.init_lora_weights"] = "pissa"
    kept["lora_adapter_metadata"] = json.dumps(packed)
    rewrite(tmp_path, dict, metadata=kept)
    before = {k: v.clone() for k, v in family.network.state_dict().items()}
    family.load_lora("text", str(tmp_path))
    after = family.network.state_dict()
    for name, tensor in before.items():
        known = name if name in after else ".base_layer.".join(name.rsplit(".", 1))
        assert torch.equal(after[known], tensor)


def refused(family, path) -> str:
    """The one line with which a LoRA is refused; the family stays as it was."""
    family.add_lora("other", LoraConfig(rank=4, alpha=16), seed=0)
    parameters = [name for name, _ in family.network.named_parameters()]
    with pytest.raises(ModelError) as caught:
        family.load_lora("text", str(path))
    message = str(caught.value)
    assert message.startswith("LoRA 'text'")
    assert "\n" not in message
    assert family.adapters == ("other",)
    assert [name for name, _ in family.network.named_parameters()] == parameters
    assert list(family.network.peft_config) == [family._slots["other"]]
    return message


def test_a_missing_file_is_refused(family, tmp_path):
    assert "there is no such file or folder" in refused(family, tmp_path / "nowhere")


def test_a_folder_without_one_clear_file_is_refused(family, tmp_path, saved):
    assert "its top folder has no *.safetensors; give one of these subfolders: lora, lora/peft" in refused(
        family, tmp_path
    )
    family.remove_adapter("other")
    (tmp_path / "bare" / "inner").mkdir(parents=True)
    assert "has no *.safetensors; its folders are none" in refused(family, tmp_path / "bare")
    family.remove_adapter("other")
    for name in ("a", "b"):
        save_file(load_file(saved / FILE), tmp_path / f"{name}.safetensors")
    assert "but a.safetensors, b.safetensors" in refused(family, tmp_path)


def test_a_file_of_another_kind_is_refused(family, saved):
    (saved / FILE).write_bytes(b"not a safetensors file")
    assert "cannot be read" in refused(family, saved)


def test_names_that_would_not_bind_are_refused(family, saved):
    rewrite(saved, lambda tensors: {f"unet.{k}": v for k, v in tensors.items()})
    message = refused(family, saved)
    assert "binds 0 of 46 tensors" in message
    assert "unet.transformer" in message


@pytest.mark.parametrize("prefix", ["text_encoder", "text_encoder_2", "base_model.model.text_model"])
def test_a_lora_of_a_text_encoder_is_refused(family, saved, prefix):
    extra = {
        f"{prefix}.layers.0.q.lora_A.weight": torch.ones(4, 16),
        f"{prefix}.layers.0.q.lora_B.weight": torch.ones(16, 4),
    }
    rewrite(saved, lambda tensors: {**tensors, **extra})
    assert (
        f"also adapts text encoders, which are frozen here: 2 of 48 tensors, the first is '{prefix}.layers.0.q"
    ) in refused(family, saved)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "lora_te1_text_model_q",
        "transformer.transformer_blocks.0.attn.to_q",
    ],
)
def test_kohyas_layout_is_refused_by_its_name(family, saved, name):
    extra = {f"{name}.lora_down.weight": torch.ones(4, 16), f"{name}.alpha": torch.tensor(4.0)}
    rewrite(saved, lambda tensors: {**tensors, **extra})
    message = refused(family, saved)
    assert f"is in kohya's layout ('{name}." in message and "convert it to diffusers'" in message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "is of a PEFT folder, whose adapter_config.json is not beside it: its alpha is written there"),
        ("{", "cannot be read: Expecting property name"),
        ("[]", "cannot be read: adapter_config.json holds a list"),
        ('{"r": 4, "lora_alpha": null}', "does not say its alpha"),
    ],
)
def test_a_peft_folder_without_its_alpha_is_refused(family, saved, config, expected):
    file = saved / "peft" / "adapter_config.json"
    file.unlink() if config is None else file.write_text(config)
    assert expected in refused(family, saved / "peft")


@pytest.mark.parametrize("extra", [f"{Q}.lora_magnitude_vector", f"{Q}.lora_B.bias", "noise"])
def test_a_tensor_that_is_no_lora_pair_is_refused(family, saved, extra):
    rewrite(saved, lambda tensors: {**tensors, extra: torch.ones(32)})
    message = refused(family, saved)
    assert "would bind 46 of 47 tensors" in message
    assert extra.removeprefix("transformer.") in message


def test_half_a_pair_is_refused(family, saved):
    lost = f"{Q}.lora_B.weight"
    rewrite(saved, lambda tensors: {k: v for k, v in tensors.items() if k != lost})
    assert "would bind 44 of 45 tensors" in refused(family, saved)


def test_an_empty_file_is_refused(family, saved):
    rewrite(saved, lambda tensors: {})
    assert "would bind 0 of 0 tensors" in refused(family, saved)


def test_another_width_is_refused(tmp_path, saved):
    wide = make_tiny_sd3(tmp_path / "wide", width=64)
    family = load_family(ModelConfig(path=str(wide)), text=False, image=False)
    message = refused(family, saved)
    assert "add_k_proj is [64, 64] here, its pair is A [4, 32] and B [32, 4]" in message


@pytest.mark.parametrize(
    ("half", "rows", "columns", "pair"),
    [
        ("lora_A", 4, 31, r"A \[4, 31\] and B \[32, 4\]"),
        ("lora_A", 3, 32, r"A \[3, 32\] and B \[32, 4\]"),
        ("lora_B", 31, 4, r"A \[4, 32\] and B \[31, 4\]"),
    ],
)
def test_one_side_of_another_shape_is_refused(family, saved, half, rows, columns, pair):
    def cut(tensors):
        small = {k: v[:rows, :columns].contiguous() for k, v in tensors.items() if half in k}
        return {**tensors, **small}

    rewrite(saved, cut)
    assert re.search(pair, refused(family, saved))


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_lora_that_changes_nothing_is_refused(family, saved, half):
    rewrite(saved, lambda tensors: {k: v * 0 if half in k else v for k, v in tensors.items()})
    assert "changes nothing" in refused(family, saved)


@pytest.mark.parametrize("where", ["lora_alpha", "alpha_pattern"])
def test_a_lora_of_no_strength_is_refused(family, saved, where):
    told = json.loads(header(saved / FILE)["lora_adapter_metadata"])
    told[f"transformer.{where}"] = 0 if where == "lora_alpha" else dict.fromkeys(ATTENTION, 0)
    rewrite(saved, dict, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    assert "changes nothing: alpha, lora_A or lora_B" in refused(family, saved)


def test_values_that_are_no_numbers_are_refused(family, saved):
    rewrite(saved, lambda tensors: {k: v * torch.nan if "to_q.lora_A" in k else v for k, v in tensors.items()})
    assert "has NaN or infinite values in" in refused(family, saved)


def test_halves_that_cancel_are_refused(family, saved):
    def cancel(tensors):
        """A's rows are equal, and B's columns sum to zero."""
        new = {}
        for key, tensor in tensors.items():
            if "lora_A" in key:
                new[key] = tensor[:1].expand_as(tensor).contiguous()
            else:
                signs = torch.tensor([1.0, -1.0]).repeat(tensor.shape[1] // 2)
                new[key] = torch.ones_like(tensor) * signs
        return new

    rewrite(saved, cancel)
    assert "changes nothing" in refused(family, saved)


def test_an_alpha_may_be_given_where_the_file_says_none(family, saved, expected, answer):
    with pytest.raises(ModelError, match="says alpha 16 itself; leave out the alpha 8"):
        family.load_lora("a", str(saved), alpha=8)
    assert family.load_lora("told", str(saved), alpha=16).alpha == 16
    rewrite(saved, dict, metadata={"format": "pt"})
    assert family.load_lora("given", str(saved), alpha=16).alpha == 16
    with family.adapter("given"):
        assert torch.equal(answer(family), expected)


def test_an_unknown_alpha_is_refused(family, saved):
    rewrite(saved, dict, metadata={"format": "pt"})
    message = refused(family, saved)
    assert "does not say its alpha" in message
    assert "transformer_lora_adapter_metadata" in message


def test_an_alpha_for_some_modules_alone_is_refused(family, saved):
    extra = {f"{Q}.alpha": torch.tensor(16.0)}
    rewrite(saved, lambda tensors: {**tensors, **extra}, metadata={"format": "pt"})
    assert "does not say its alpha" in refused(family, saved)


def test_a_rank_other_than_the_tensors_own_is_refused(family, saved):
    kept = header(saved / FILE)
    packed = json.loads(kept["lora_adapter_metadata"])
    packed["transformer.r"] = 8
    kept["lora_adapter_metadata"] = json.dumps(packed)
    rewrite(saved, dict, metadata=kept)
    refused(family, saved)


def test_a_binding_that_loses_a_tensor_is_refused(family, saved, monkeypatch):
    """What check_fits cannot see: a library that binds other values than the file's."""
    load = type(family.network).load_lora_adapter

    def careless(network, tensors, **options):
        load(network, {k: v * 1.5 if "blocks.1" in k else v for k, v in tensors.items()}, **options)

    monkeypatch.setattr(type(family.network), "load_lora_adapter", careless)
    assert "has 46 tensors; 30 are bound to the model's 46" in refused(family, saved)


def test_a_name_is_taken_once(trained, saved):
    with pytest.raises(ModelError, match=r"'student': there is an adapter of that name"):
        trained.load_lora("student", str(saved))
    assert trained.adapters == ("student",)


def test_loading_beside_an_adapter_in_use_leaves_it_in_use(trained, saved, answer):
    trained.use("student")
    trained.train_adapter("student")
    before = answer(trained)
    trained.load_lora("text", str(saved))
    assert trained.active == "student"
    fill(trained, "text")
    assert torch.equal(answer(trained), before)
    assert all(p.requires_grad for p in trained.adapter_parameters("student").values())


def test_adapters_are_checked_before_any_weights_are_there(tiny, tmp_path, saved):
    for file in ("model_index.json", "transformer/config.json"):
        (tmp_path / "bare" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bare" / file).write_bytes((tiny / file).read_bytes())
    model, lora = ModelConfig(path=str(tmp_path / "bare")), LoraConfig(rank=4)
    state = torch.get_rng_state()
    check_adapters(model, lora, {"text": TeacherConfig(lora=str(saved))})
    check_adapters(model, lora, {"text": TeacherConfig(lora=str(saved), subfolder="peft")})
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ModelError, match=r"'student': targets attn.to_z match no linear layer"):
        check_adapters(model, LoraConfig(targets=("attn.to_z",)), {})
    with pytest.raises(ModelError, match=r"LoRA 'text': .* there is no such file or folder"):
        check_adapters(model, lora, {"text": TeacherConfig(lora=str(tmp_path / "nowhere"))})
    rewrite(saved, lambda tensors: {k: v[:, :3].contiguous() for k, v in tensors.items()})
    with pytest.raises(ModelError, match=r"LoRA 'text' .* made for another architecture"):
        check_adapters(model, lora, {"text": TeacherConfig(lora=str(saved))})
    index = tmp_path / "bare" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match=r"is a FluxPipeline; family 'sd3' loads"):
        check_adapters(model, lora, {})
