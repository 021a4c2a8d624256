"""Small random scorers of the published ones' classes and file layouts, and what their networks are called inside."""

import json
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from transformers import BertTokenizer, CLIPConfig, CLIPModel

from opd_ray.rewards.head import Head
from tests.models.tiny_sd3 import LETTERS, clip_tokenizer

EDGE = 32
HPS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": EDGE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def pictures(count: int, height: int = EDGE, width: int = EDGE) -> Tensor:
    return torch.rand((count, 3, height, width), generator=torch.Generator().manual_seed(5))


def make_clip(folder: Path) -> Path:
    """A CLIPModel and its tokenizer in one folder, as on a hub."""
    tokenizer = clip_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**text, **special, "vocab_size": len(tokenizer), "attention_dropout": 0.5},
        vision_config={**text, "image_size": EDGE, "patch_size": 8, "attention_dropout": 0.5},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
        spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_head(folder: Path, width: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.save(Head(width).state_dict(), folder / "aesthetic-model.pth")
    return folder


def make_hps(folder: Path, name: str) -> Path:
    """As HPS_v2.1_compressed.pt: float16 under ``state_dict``, beside what else a training script keeps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = open_clip.CLIP(**HPS)
        spread(model)
    torch.save({"epoch": 1, "state_dict": {key: one.half() for key, one in model.state_dict().items()}}, folder / name)
    return folder


def know_hps(folder: Path) -> str:
    """Tell open_clip of the small architecture."""
    (folder / "opd-ray-tiny.json").write_text(json.dumps(HPS))
    open_clip.add_model_config(folder / "opd-ray-tiny.json")
    return "opd-ray-tiny"


def spread(model: torch.nn.Module) -> None:
    """Weights so large that pictures and texts tell, which those of a fresh model are not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "logit_scale" not in name:
                parameter.mul_(3)


def imagereward_shapes(
    width: int, layers: int, edge: int, patch: int, words: int, read: int, text_layers: int, positions: int
) -> dict[str, tuple[int, ...]]:
    """Every tensor of ImageReward.pt and its shape: BLIP's own names, written down from its code.

    salesforce/BLIP: models/vit.py (timm's ViT), models/med.py (BERT with cross-attention), models/blip_pretrain.py
    (two projections to 256); THUDM/ImageReward: ImageReward.py (mlp.layers).
    """
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, size: int) -> None:
        found.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    see = "blip.visual_encoder"
    found[f"{see}.cls_token"] = (1, 1, width)
    found[f"{see}.pos_embed"] = (1, (edge // patch) ** 2 + 1, width)
    found[f"{see}.patch_embed.proj.weight"] = (width, 3, patch, patch)
    found[f"{see}.patch_embed.proj.bias"] = (width,)
    for layer in range(layers):
        block = f"{see}.blocks.{layer}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm(f"{see}.norm", width)
    text = "blip.text_encoder"
    found[f"{text}.embeddings.position_ids"] = (1, positions)
    found[f"{text}.embeddings.word_embeddings.weight"] = (words, read)
    found[f"{text}.embeddings.position_embeddings.weight"] = (positions, read)
    norm(f"{text}.embeddings.LayerNorm", read)
    for layer in range(text_layers):
        for kind, inputs in (("attention", read), ("crossattention", width)):
            part = f"{text}.encoder.layer.{layer}.{kind}"
            linear(f"{part}.self.query", read, read)
            linear(f"{part}.self.key", read, inputs)
            linear(f"{part}.self.value", read, inputs)
            linear(f"{part}.output.dense", read, read)
            norm(f"{part}.output.LayerNorm", read)
        part = f"{text}.encoder.layer.{layer}"
        linear(f"{part}.intermediate.dense", 4 * read, read)
        linear(f"{part}.output.dense", read, 4 * read)
        norm(f"{part}.output.LayerNorm", read)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, read)
    for number, (inputs, outputs) in {0: (read, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        linear(f"mlp.layers.{number}", outputs, inputs)
    return found


def make_imagereward(folder: Path) -> Path:
    """ImageReward.pt with heads of 64, as the published one has them, and BERT's tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    generator = torch.Generator().manual_seed(3)
    shapes = imagereward_shapes(128, 2, EDGE, 8, len(words), 64, 2, 40)
    tensors = {}
    for name, shape in shapes.items():
        norm = name.endswith("weight") and len(shape) == 1
        tensors[name] = norm + torch.randn(shape, generator=generator) * (0.1 if len(shape) < 2 else 0.2)
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(tensors, folder / "ImageReward.pt")
    return folder
