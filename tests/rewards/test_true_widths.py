"""The networks at their published sizes, on the meta device: numbers of parameters and names of tensors.

No published weights are here. What can be compared is what is known of them: the models' cards, and sizes of files.
"""

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from opd_ray.models.published import fit
from opd_ray.rewards.blip import Blip, renamed
from opd_ray.rewards.head import Head
from opd_ray.rewards.imagereward import UNUSED
from tests.rewards.tiny import imagereward_shapes

H14 = 986_109_441
"""Of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, from which PickScore and HPSv2 were trained on."""
L14 = 427_616_513
"""Of openai/clip-vit-large-patch14 (OpenAI, "CLIP": ViT-L/14)."""


def clip(text: tuple[int, int], vision: tuple[int, int], projection: int, act: str) -> CLIPModel:
    """A CLIP with (width, layers) of each tower and patches of 14, as its config.json has them."""

    def sizes(width: int, layers: int) -> dict[str, object]:
        common = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**common, "num_attention_heads": 16, "hidden_act": act, "projection_dim": projection}

    config = CLIPConfig(
        text_config=sizes(*text),
        vision_config={**sizes(*vision), "patch_size": 14, "image_size": 224},
        projection_dim=projection,
    )
    with torch.device("meta"):
        return CLIPModel(config)


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def clip_names(layers: dict[str, int]) -> set[str]:
    """The tensors of a CLIPModel in safetensors, written down from the published files' layout."""
    pair = ("weight", "bias")
    found = {"logit_scale", "text_projection.weight", "visual_projection.weight"}
    found |= {f"text_model.embeddings.{one}_embedding.weight" for one in ("token", "position")}
    found |= {f"vision_model.embeddings.{one}_embedding.weight" for one in ("patch", "position")}
    found |= {"vision_model.embeddings.class_embedding"}
    norms = ("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm")
    found |= {f"{norm}.{part}" for norm in norms for part in pair}
    inner = [f"self_attn.{one}_proj" for one in "qkv"] + ["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    inner += ["layer_norm1", "layer_norm2"]
    for tower, count in layers.items():
        found |= {f"{tower}.encoder.layers.{i}.{one}.{part}" for i in range(count) for one in inner for part in pair}
    return found


def test_pickscore_is_a_vit_h_14() -> None:
    model = clip((1024, 24), (1280, 32), 1024, "gelu")
    assert numbers(model) == H14
    assert set(model.state_dict()) == clip_names({"text_model": 24, "vision_model": 32})


def test_clipscore_is_a_vit_l_14_and_aesthetic_is_its_picture_half() -> None:
    model = clip((768, 12), (1024, 24), 768, "quick_gelu")
    assert numbers(model) == L14
    names = clip_names({"text_model": 12, "vision_model": 24})
    assert set(model.state_dict()) == names
    with torch.device("meta"):
        half = CLIPVisionModelWithProjection(model.config.vision_config)
    assert set(half.state_dict()) == {name for name in names if name.startswith("vis")}
    # 24 layers of 12 width^2 and 13 width; patches, positions, class, two norms; the projection.
    width = 1024
    expected = 24 * (12 * width**2 + 13 * width) + (3 * 14**2 + 257 + 1 + 4) * width + width * 768
    assert numbers(half) == expected == 303_966_208


def test_the_head_is_the_published_one() -> None:
    """sac+logos+ava1-l14-linearMSE.pth has 3.7 MB."""
    with torch.device("meta"):
        head = Head(768)
    expected = 768 * 1024 + 1024 + 1024 * 128 + 128 + 128 * 64 + 64 + 64 * 16 + 16 + 16 + 1
    assert numbers(head) == expected == 927_969
    assert set(head.state_dict()) == {f"layers.{i}.{part}" for i in (0, 2, 4, 6, 7) for part in ("weight", "bias")}
    assert round(4 * expected / 1e6, 1) == 3.7


def test_hpsv2_is_open_clip_s_vit_h_14() -> None:
    """HPS_v2_compressed.pt and HPS_v2.1_compressed.pt have 1.97 GB: these parameters in 16 bits."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert numbers(model) == H14 and round(2 * H14 / 1e9, 2) == 1.97
    pair = ("weight", "bias")
    names = {"positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "visual.proj"}
    names |= {"visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight"}
    names |= {f"{norm}.{part}" for norm in ("visual.ln_pre", "visual.ln_post", "ln_final") for part in pair}
    inner = ("attn.in_proj_weight", "attn.in_proj_bias")
    inner += tuple(f"{one}.{p}" for one in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj") for p in pair)
    for tower, count in {"visual.transformer": 32, "transformer": 24}.items():
        names |= {f"{tower}.resblocks.{i}.{one}" for i in range(count) for one in inner}
    assert set(model.state_dict()) == names


def test_imagereward_is_blip_large_with_a_bert_that_looks() -> None:
    """ImageReward.pt has 1 786 880 927 bytes: its tensors in 32 bits, and some 340 bytes for each one's name."""
    shapes = imagereward_shapes(1024, 24, 224, 16, 30524, 768, 12, 512)
    tensors = {renamed(name): torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        model = Blip(tensors, "ImageReward")
    assert model.size == 224 and model.words == 30524
    assert {module.num_heads for module in model.viewer.modules() if hasattr(module, "num_heads")} == {16}
    read = [module for module in model.reader.modules() if hasattr(module, "num_attention_heads")]
    assert {module.num_attention_heads for module in read} == {12} and len(read) == 2 * 12
    fit(model, tensors, "ImageReward", UNUSED)  # every name and every shape
    assert len(tensors) == len(model.state_dict()) + len(UNUSED) == 294 + 316 + 10 + 5
    assert numbers(model) == 446_206_689
    positions = 8 * 512  # whole numbers of 64 bits
    told = 4 * sum(one.numel() for name, one in tensors.items() if "position_ids" not in name) + positions
    assert told == 1_786_667_908
    assert 1_786_880_927 - told == pytest.approx(340 * len(shapes), rel=0.01)
