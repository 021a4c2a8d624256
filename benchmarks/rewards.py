"""Rewards: pictures a second in batches and one at a time, in one run.

    python benchmarks/rewards.py --batch 16 --repeats 5

Each reward is made as a run makes it, from files that are written first: random weights of the published classes and
layouts, of a moderate width, or with --true-widths of the published sizes (up to 4 GB of disk and 8 GB of memory for
one reward). The speed does not depend on what the weights are. In turns, each repeat scores the same pictures with
their own prompts in both ways. A new reward is a line of FILES.
"""

import argparse
import gc
import json
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.table import Table
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.utils import logging

from opd_ray.console import console
from opd_ray.rewards import make_rewards
from opd_ray.rewards.head import Head

PROMPT = 'a red cat and two blue dogs in front of a house by the sea, a sign that says "hello", an oil painting'


@dataclass(frozen=True)
class Sizes:
    """Width, layers and patch of what views pictures, width and layers of what reads texts, width of both's points.

    ``head`` is the width of an attention head of the first.
    """

    view: int
    layers: int
    patch: int
    read: int
    text_layers: int
    points: int
    head: int = 64


H14 = Sizes(1280, 32, 14, 1024, 24, 1024, head=80)
L14, BLIP = Sizes(1024, 24, 14, 768, 12, 768), Sizes(1024, 24, 16, 768, 12, 0)
MODERATE = Sizes(256, 6, 16, 256, 4, 128)


def clip(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """A CLIPModel, in 16 bits on the disk, and a tokenizer of as many tokens as its own."""
    inner = {"num_attention_heads": sizes.view // sizes.head, "num_hidden_layers": sizes.layers}
    words = [*string.printable, *(f"{letter}</w>" for letter in string.printable)]
    words += [f"<{number}>" for number in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)
    config = CLIPConfig(
        vision_config=inner
        | {"hidden_size": sizes.view, "intermediate_size": 4 * sizes.view, "patch_size": sizes.patch},
        text_config={
            "hidden_size": sizes.read,
            "intermediate_size": 4 * sizes.read,
            "num_attention_heads": sizes.read // 64,
            "num_hidden_layers": sizes.text_layers,
            "vocab_size": len(tokenizer),
        },
        projection_dim=sizes.points,
    )
    CLIPModel(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "processor": str(folder)}


def aesthetic(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """That and the head."""
    args = clip(folder, sizes)
    save_file(Head(sizes.points).state_dict(), folder / "head.safetensors")
    return {"model": args["model"], "head": str(folder / "head.safetensors")}


def hps(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """An open_clip of an architecture that is named here."""
    config = {
        "embed_dim": sizes.points,
        "vision_cfg": {
            "image_size": 224,
            "layers": sizes.layers,
            "width": sizes.view,
            "head_width": sizes.head,
            "patch_size": sizes.patch,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": sizes.read,
            "heads": sizes.read // 64,
            "layers": sizes.text_layers,
        },
    }
    name = f"benchmark-{sizes.view}"
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    tensors = {key: one.half().contiguous() for key, one in open_clip.CLIP(**config).state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return {"model": str(folder / "model.safetensors"), "architecture": name}


def imagereward(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """BLIP's two halves, the head, and a tokenizer of letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.printable.split()[0]]
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    words += [f"[unused{number}]" for number in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    view = BlipVisionConfig(
        hidden_size=sizes.view,
        intermediate_size=4 * sizes.view,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.view // 64,
        image_size=224,
        patch_size=sizes.patch,
    )
    read = BlipTextConfig(
        hidden_size=sizes.read,
        encoder_hidden_size=sizes.view,
        intermediate_size=4 * sizes.read,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.read // 64,
    )
    parts = {
        "viewer": BlipVisionModel(view),
        "reader": BlipTextModel(read, add_pooling_layer=False),
        "mlp": Head(sizes.read),
    }
    tensors = {f"{part}.{key}": one for part, module in parts.items() for key, one in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return {"model": str(folder / "model.safetensors"), "tokenizer": str(folder)}


def nothing(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """It has no files, or brings them along."""
    return {}


FILES: dict[str, tuple[Callable[[Path, Sizes], dict[str, Any]], Sizes]] = {
    "pickscore": (clip, H14),
    "hpsv2": (hps, H14),
    "hpsv2_1": (hps, H14),
    "clipscore": (clip, L14),
    "aesthetic": (aesthetic, L14),
    "imagereward": (imagereward, BLIP),
    "ocr": (nothing, MODERATE),
    "jpeg_compressibility": (nothing, MODERATE),
}
"""Name -> what writes its files into a folder and tells the reward's arguments, and its published sizes."""


def seconds(score: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    score()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(reward: Any, args: argparse.Namespace) -> dict[str, list[float]]:
    """Pictures a second of each way, one number a repeat."""
    images = torch.rand((args.batch, 3, args.edge, args.edge), generator=torch.Generator().manual_seed(0))
    prompts = [f"{PROMPT}, number {index}" for index in range(args.batch)]
    ways: dict[str, Callable[[], object]] = {
        "batched": lambda: reward(images, prompts),
        "one at a time": lambda: [reward(images[[i]], prompts[i : i + 1]) for i in range(args.batch)],
    }
    reward(images[:2], prompts[:2])  # everything is allocated
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, score in ways.items():
            rates[way].append(args.batch / seconds(score, args.device))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", default=",".join(FILES), help="names, with commas between them")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--edge", type=int, default=512, help="of a picture, in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--true-widths", action="store_true", help="the published sizes")
    args = parser.parse_args()
    logging.disable_progress_bar()
    console.print(f"{args.batch} pictures of {args.edge} pixels, {torch.get_num_threads()} threads, {args.device}")
    table = Table("images/s", "batched", "one at a time", "ratio")
    for name in args.rewards.split(","):
        write, published = FILES[name]
        with tempfile.TemporaryDirectory() as folder:
            arguments = write(Path(folder), published if args.true_widths else MODERATE)
            reward = make_rewards({name: arguments}, args.device)[name]
        rates = measure(reward, args)
        ratios = [whole / single for whole, single in zip(rates["batched"], rates["one at a time"], strict=True)]
        table.add_row(name, *(middle(found) for found in (rates["batched"], rates["one at a time"], ratios)))
        del reward
        gc.collect()
    console.print(table)


def middle(found: list[float]) -> str:
    """Median with spread."""
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


if __name__ == "__main__":
    main()
