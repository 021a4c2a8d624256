"""Each neural reward against its formula, computed some other way."""

import math

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from opd_ray.rewards.pixels import cropped, padded
from tests.rewards.tiny import EDGE, HPS, pictures

PROMPTS = ["a red cat", "2 dogs, and a house", "sea"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def as_files(images) -> list[Image.Image]:
    """What a file would hold."""
    return [TF.to_pil_image((image * 255).round().to(torch.uint8)) for image in images]


@pytest.mark.parametrize("size", [(300, 300), (256, 341), (341, 256), (64, 64), (224, 224), (225, 511)])
def test_pictures_are_cropped_as_the_stock_processor_does_it(size) -> None:
    images = F.interpolate(pictures(2, 12, 12), size=size, mode="bicubic").clamp(0, 1)
    images[1] = pictures(1, *size)[0]  # noise is the worst for a resize
    stock = CLIPImageProcessorPil()(as_files(images), return_tensors="pt")["pixel_values"]
    levels = (cropped(images, 224) - stock).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels.max() < 2.01  # whole weights there, and halves that round up: one level in either direction
    assert (levels > 0.5).float().mean() < 0.02


def test_pictures_that_fit_are_rounded_to_8_bits_and_normalised() -> None:
    image = torch.full((1, 3, 2, 2), 0.5)
    red, green, blue = ((128 / 255 - mean) / std for mean, std in zip(MEAN, STD, strict=True))
    assert torch.allclose(cropped(image, 2)[0, :, 0, 0], torch.tensor([red, green, blue]), atol=1e-6)
    over = cropped(torch.tensor([-0.1, 1.2]).view(1, 1, 1, 2).expand(1, 3, 2, 2), 2)
    assert torch.equal(over, cropped(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(1, 3, 2, 2), 2))


def test_what_is_padded_is_black_and_centred() -> None:
    wide, tall = (
        padded(torch.ones(1, 3, *size), 4)[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        for size in ((2, 4), (4, 2))
    )
    expected = torch.tensor([[0.0] * 4, [1.0] * 4, [1.0] * 4, [0.0] * 4])
    assert torch.allclose(wide[1], expected, atol=1e-6) and torch.allclose(tall[1], expected.T, atol=1e-6)
    assert padded(torch.ones(1, 3, 100, 51), 20).shape == (1, 3, 20, 20)


def raw_towers(scorer) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Unnormalised embeddings of pictures and prompts, one after the other and without padding; and the scale."""
    model = CLIPModel.from_pretrained(scorer.folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(scorer.folder)
    seen, read = [], []
    for image, prompt in zip(as_files(pictures(3)), PROMPTS, strict=True):
        pixels = TF.normalize(TF.to_tensor(image), MEAN, STD)[None]
        seen.append(model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T)
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        read.append(model.text_model(tokens).pooler_output @ model.text_projection.weight.T)
    return torch.cat(seen), torch.cat(read), model.logit_scale.item()


@pytest.mark.parametrize(("name", "over"), [("pickscore", 1), ("clipscore", 100)])
@torch.no_grad()
def test_a_clip_s_score_is_its_scaled_cosine(scorers, name, over) -> None:
    seen, read, scale = raw_towers(scorers[name])
    assert not torch.allclose(seen.norm(dim=-1), torch.ones(3), atol=0.1)  # so that normalising shows
    expected = [
        math.exp(scale) * float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) / over
        for a, b in zip(seen, read, strict=True)
    ]
    scores = scorers[name].made(pictures(3), PROMPTS)
    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@torch.no_grad()
def test_clipscore_is_the_diagonal_of_logits_per_image_over_100(scorers) -> None:
    folder = scorers["clipscore"].folder
    text = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.stack([TF.normalize(TF.to_tensor(image), MEAN, STD) for image in as_files(pictures(3))])
    logits = CLIPModel.from_pretrained(folder).eval()(pixel_values=pixels, **text).logits_per_image
    assert torch.allclose(scorers["clipscore"].made(pictures(3), PROMPTS), logits.diagonal() / 100, atol=1e-5)


@torch.no_grad()
def test_aesthetic_is_affine_in_the_picture_s_direction(scorers) -> None:
    scorer = scorers["aesthetic"]
    seen, _, _ = raw_towers(scorer)
    content = torch.load(scorer.folder / scorer.file, weights_only=True)
    matrix, offset = np.eye(12), np.zeros(12)
    for layer in (0, 2, 4, 6, 7):  # the product of five matrices, in float64
        weight, bias = (content[f"layers.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
        matrix, offset = weight @ matrix, weight @ offset + bias
    direction = (seen / seen.norm(dim=-1, keepdim=True)).double().numpy()
    expected = (direction @ matrix.T + offset)[:, 0]
    assert scorer.made(pictures(3), PROMPTS).numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2_1"])
@torch.no_grad()
def test_hps_is_the_cosine_of_open_clip_s_features(scorers, name) -> None:
    scorer = scorers[name]
    content = torch.load(scorer.folder / scorer.file, weights_only=True)
    model = open_clip.CLIP(**HPS, output_dict=True)
    model.load_state_dict(content["state_dict"], strict=True)
    model.eval()
    images = pictures(3, EDGE // 2, EDGE)  # wide: black above and below
    whole = [TF.pad(TF.to_tensor(image), [0, EDGE // 4, 0, EDGE // 4]) for image in as_files(images)]
    pixels = torch.stack([TF.normalize(image, MEAN, STD) for image in whole])
    found = model(pixels, open_clip.tokenize(PROMPTS))
    expected = (found["image_features"] @ found["text_features"].T).diagonal()
    assert found["image_features"].norm(dim=-1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert torch.allclose(scorer.made(images, PROMPTS), expected, atol=1e-5)


@torch.no_grad()
def test_imagereward_is_blip_and_a_head_computed_by_hand(scorers) -> None:
    """The ViT is timm's, which BLIP's is; BERT and head are written out below from the file's own tensors."""
    scorer = scorers["imagereward"]
    tensors = torch.load(scorer.folder / scorer.file, weights_only=True)
    tokenizer = BertTokenizer.from_pretrained(scorer.folder)
    scores = scorer.made(pictures(3), PROMPTS).tolist()
    for image, prompt, score in zip(as_files(pictures(3)), PROMPTS, scores, strict=True):
        pixels = TF.normalize(TF.to_tensor(image), MEAN, STD)[None]
        tokens = torch.tensor(tokenizer(prompt)["input_ids"])  # no padding: it must not be attended to
        state = bert(tensors, tokens, viewed(tensors, pixels))[0]
        for layer in (0, 2, 4, 6, 7):
            state = linear(tensors, f"mlp.layers.{layer}", state)
        assert score == pytest.approx((state.item() - 0.16717362830052426) / 1.0333394966054072, rel=1e-5, abs=1e-5)


def viewed(tensors, pixels) -> torch.Tensor:
    """[patches + 1, width]."""
    prefix = "blip.visual_encoder."
    own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    model = timm.models.VisionTransformer(
        img_size=EDGE, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=0
    )
    model.load_state_dict(own, strict=True)
    return model.eval().forward_features(pixels)[0]


def bert(tensors, tokens, seen) -> torch.Tensor:
    """[L, width]: post-norm layers of self-attention, cross-attention to what was seen, and two linear ones."""
    top = "blip.text_encoder."
    state = tensors[f"{top}embeddings.word_embeddings.weight"][tokens]
    state = state + tensors[f"{top}embeddings.position_embeddings.weight"][: len(tokens)]
    state = norm(tensors, f"{top}embeddings.LayerNorm", state)
    for layer in range(2):
        at = f"{top}encoder.layer.{layer}."
        for kind, other in (("attention", None), ("crossattention", seen)):
            keys = state if other is None else other
            query, key = linear(tensors, f"{at}{kind}.self.query", state), linear(tensors, f"{at}{kind}.self.key", keys)
            weights = (query @ key.T / math.sqrt(64)).softmax(-1)  # one head of 64
            mixed = weights @ linear(tensors, f"{at}{kind}.self.value", keys)
            mixed = linear(tensors, f"{at}{kind}.output.dense", mixed)
            state = norm(tensors, f"{at}{kind}.output.LayerNorm", mixed + state)
        inner = F.gelu(linear(tensors, f"{at}intermediate.dense", state))
        inner = linear(tensors, f"{at}output.dense", inner)
        state = norm(tensors, f"{at}output.LayerNorm", inner + state)
    return state


def linear(tensors, name, state) -> torch.Tensor:
    return state @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def norm(tensors, name, state) -> torch.Tensor:
    centred = state - state.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]
