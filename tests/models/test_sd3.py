"""SD3 against the stock pipeline, and what it refuses to load."""

import itertools
import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from opd_ray.config import ModelConfig
from opd_ray.errors import ConfigError, ModelError
from opd_ray.models import family_class, load_family, read_shift, resolve, sigmas_of
from tests.models.conftest import PROMPTS
from tests.models.tiny_sd3 import make_tiny_sd3


def draw(family, x, cond, uncond, guidance, num_steps):
    sigmas = family.sigmas(num_steps).tolist()
    for t, t_next in itertools.pairwise(sigmas):
        x = x + (t_next - t) * family.velocity(x, t, cond, uncond, guidance)
    return x


def stock(folder, **options):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint to break, and its ModelConfig."""
    shutil.copytree(tiny, tmp_path / "copy")
    return tmp_path / "copy", ModelConfig(path=str(tmp_path / "copy"))


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_drawing_equals_the_stock_pipeline(tiny, full, batch, guidance):
    x, cond, uncond = batch
    ours = full.decode(draw(full, x, cond, uncond, guidance, 4))
    theirs = stock(tiny)(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=x.clone(),
        height=16,
        width=16,
        max_sequence_length=32,
        output_type="pt",
    ).images
    assert ours.shape == (2, 3, 16, 16)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 0.01  # not two blank images


def test_without_t5_it_equals_the_stock_pipeline(tmp_path):
    folder = make_tiny_sd3(tmp_path / "no_t5", t5=False)
    family = load_family(ModelConfig(path=str(folder), max_sequence_length=20), text=True, image=False)
    pipeline = stock(folder, text_encoder_3=None, tokenizer_3=None)
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=20)
    cond = family.encode(PROMPTS)
    assert cond["encoder_hidden_states"].shape == (2, 77 + 20, 40)
    assert not cond["encoder_hidden_states"][:, 77:].any()
    assert torch.equal(cond["encoder_hidden_states"], states)
    assert torch.equal(cond["pooled_projections"], pooled)


@pytest.mark.parametrize(("asked", "tokens"), [(128, 32), (9, 9)])
def test_t5_reads_no_more_than_asked_and_no_more_than_it_can(tiny, asked, tokens):
    model = ModelConfig(path=str(tiny), max_sequence_length=asked)
    cond = load_family(model, text=True, image=False).encode(["a " * 200])
    assert cond["encoder_hidden_states"].shape[1] == 77 + tokens


def test_guidance_one_is_one_forward_and_guidance_is_one_of_twice_the_rows(full, batch):
    x, cond, uncond = batch
    rows = []
    hook = full.denoiser.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    before = full.forwards
    plain = full.velocity(x, 0.5, cond, uncond, 1)
    guided = full.velocity(x, 0.5, cond, uncond, 3)
    hook.remove()
    assert rows == [2, 4]
    assert full.forwards - before == 6
    empty = full.velocity(x, 0.5, {k: v.expand(2, *v.shape[1:]) for k, v in uncond.items()}, {}, 1)
    assert torch.allclose(guided, empty + 3 * (plain - empty), atol=1e-5)
    assert not torch.allclose(guided, plain, atol=1e-3)


@pytest.mark.parametrize("guidance", [1, 3])
def test_t_is_a_number_or_one_a_row(full, batch, guidance):
    x, cond, uncond = batch
    both = full.velocity(x, torch.tensor([0.2, 0.9]), cond, uncond, guidance)
    for row, t in enumerate((0.2, torch.tensor(0.9))):
        one = full.velocity(x, t, cond, uncond, guidance)
        assert torch.allclose(both[row], one[row], atol=1e-5)
        assert not torch.allclose(both[1 - row], one[1 - row], atol=1e-3)


def test_rows_that_do_not_belong_together_are_refused(full, batch):
    x, cond, uncond = batch
    with pytest.raises(ValueError, match=r"guidance 4.5 needs the empty prompt's encoder_hidden"):
        full.velocity(x, 0.5, cond, {}, 4.5)
    with pytest.raises(ValueError, match=r"1 latents and 2 rows of encoder_hidden_states"):
        full.velocity(x[:1], 0.5, cond, uncond, 4.5)


def test_velocity_goes_through_the_denoiser_that_an_engine_put_there(trained, batch):
    class Engine(torch.nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **given):
            self.calls += 1
            return self.module(**given)

    x, cond, _ = batch
    names = list(trained.adapter_parameters("student"))
    plain = trained.velocity(x, 0.5, cond, {}, 1)
    trained.denoiser = Engine(trained.denoiser)
    assert torch.equal(trained.velocity(x, 0.5, cond, {}, 1), plain)
    assert trained.denoiser.calls == 1
    assert list(trained.adapter_parameters("student")) == names


@pytest.mark.parametrize("shift", [3.0, 1.0, 1.73])
@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_sigmas_are_the_schedulers_without_any_weights(tmp_path, shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.save_pretrained(tmp_path / "deep" / "scheduler")
    scheduler.set_timesteps(num_steps)
    model = ModelConfig(path=str(tmp_path), subfolder="deep")
    assert read_shift(model) == shift
    assert torch.equal(sigmas_of(model, num_steps), scheduler.sigmas)


def test_sigmas_of_the_loaded_model_are_the_same(tiny, family):
    assert torch.equal(family.sigmas(7), sigmas_of(ModelConfig(path=str(tiny)), 7))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dynamic_shifting": True},
        {"shift_terminal": 0.1},
        {"num_train_timesteps": 500},
        {"_class_name": "DDIMScheduler"},
    ],
)
def test_another_schedule_is_refused(copy, change):
    folder, model = copy
    edit(folder / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(ModelError, match=r"only FlowMatchEulerDiscreteScheduler with a constant"):
        read_shift(model)


def test_everything_is_frozen_float32_and_in_eval_mode_whatever_the_file_holds(tiny, tmp_path):
    stock(tiny, dtype=torch.float16).save_pretrained(tmp_path / "half")
    for file in (tmp_path / "half").glob("*/*.safetensors"):
        assert torch.float16 in {tensor.dtype for tensor in load_file(file).values()}
    family = load_family(ModelConfig(path=str(tmp_path / "half")), text=True, image=True)
    text = family._text
    parts = [family.network, family._vae]
    parts += [text.text_encoder, text.text_encoder_2, text.text_encoder_3]
    for part in parts:
        assert not any(module.training for module in part.modules())
        for parameter in part.parameters():
            assert parameter.dtype == torch.float32
            assert not parameter.requires_grad
    assert torch.equal(family.encode(PROMPTS)["pooled_projections"], family.encode(PROMPTS)["pooled_projections"])


def test_only_what_was_asked_for_is_loaded(copy):
    folder, model = copy
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
    family = load_family(model, text=False, image=False)
    with pytest.raises(ModelError, match=r"without its text encoders"):
        family.encode(["a"])
    with pytest.raises(ModelError, match=r"without its VAE"):
        family.decode(torch.zeros(1, *family.latent_shape))
    with pytest.raises(ModelError, match=r"its vae cannot be loaded as AutoencoderKL"):
        load_family(model, text=False, image=True)
    with pytest.raises(ModelError, match=r"its text_encoder cannot be loaded as CLIPText"):
        load_family(model, text=True, image=False)


def test_images_become_the_latents_that_the_stock_autoencoder_gives(tiny, full, family):
    images = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(4))
    vae = stock(tiny).vae
    with torch.no_grad():
        mean = vae.encode(images * 2 - 1).latent_dist.mean
    latents = full.encode_images(images)
    assert torch.allclose(latents, (mean - 0.0609) * 1.5305, atol=1e-6)
    assert (latents[0] - latents[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"pictures are \[2, 3, 8, 16\], expected \[B, 3, 16, 16\]"):
        full.encode_images(images[:, :, :8])
    with pytest.raises(ModelError, match=r"without its VAE"):
        family.encode_images(images)


def test_the_fingerprint_needs_no_vae_and_shows_another_schedule(full, family, copy):
    folder, model = copy
    ours = full.fingerprint(full.model)
    assert family.fingerprint(family.model) == ours and ours["VAE scaling factor"] == 1.5305
    edit(folder / "scheduler" / "scheduler_config.json", shift=2.0)
    other = family.fingerprint(model)
    assert {key for key in other if other[key] != ours[key]} == {"shift"}


def refused(model) -> str:
    with pytest.raises(ModelError) as caught:
        load_family(model, text=True, image=True)
    message = str(caught.value)
    assert "\n" not in message
    assert model.path in message
    return message


def test_a_missing_model_is_refused_in_one_line(tmp_path):
    assert "there is no such file or folder" in refused(ModelConfig(path=str(tmp_path / "nowhere")))


def test_another_pipeline_is_refused(copy):
    folder, model = copy
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    assert "is a FluxPipeline" in refused(model)


def test_a_missing_part_is_refused(copy):
    folder, model = copy
    shutil.rmtree(folder / "transformer")
    assert "its transformer cannot be loaded" in refused(model)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "text_encoder_3"])
def test_a_weight_that_the_file_lacks_is_refused(copy, part):
    folder, model = copy
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    lost = min(weights)
    save_file({k: v for k, v in weights.items() if k != lost}, file, metadata={"format": "pt"})
    message = refused(model)
    assert part in message
    assert lost in message


def test_other_shapes_are_refused(copy):
    folder, model = copy
    edit(folder / "transformer" / "config.json", num_attention_heads=4)
    assert "its transformer cannot be loaded" in refused(model)


def test_pickled_weights_are_refused(copy):
    folder, model = copy
    (file,) = (folder / "transformer").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert "its transformer cannot be loaded" in refused(model)


def test_world_stands_for_the_packaged_folders(monkeypatch, tmp_path):
    from opd_ray import world

    monkeypatch.setattr(world, "pipeline_path", lambda: tmp_path / "base", raising=False)
    monkeypatch.setattr(world, "lora_path", lambda name: tmp_path / name, raising=False)
    assert resolve("world") == str(tmp_path / "base")
    assert resolve("world/text") == str(tmp_path / "text")
    assert resolve("worlds/text") == "worlds/text"


def test_a_specialist_that_the_world_lacks_is_refused(family):
    with pytest.raises(ModelError, match=r"world/nothing: world has no specialist 'nothing'"):
        family.load_lora("text", "world/nothing")


def test_a_family_is_found_by_name_or_by_class():
    assert family_class("sd3") is family_class("opd_ray.models.sd3:SD3")
    with pytest.raises(ConfigError, match=r"family 'flux' is unknown. Known: sd, sd3, sdxl"):
        family_class("flux")
    with pytest.raises(ConfigError, match=r"not a subclass of opd_ray.models.Family"):
        family_class("pathlib:Path")
