"""Seconds and model-FLOP utilisation of each role, and the peak memory of one card that holds them all.

    python benchmarks/performance.py --device cuda --peak-tflops 989        # SD3.5 medium's true size, random weights
    python benchmarks/performance.py --device cpu --layers 2 --heads 2 --repeats 1 --resolution 64

The denoiser has Stable Diffusion 3.5 medium's architecture and size, random weights, 512 px, bf16; student and three
teachers are rank-32 LoRAs over one base, as `configs/cluster/one_gpu.yaml` places them, but without text encoders and
VAE. Model FLOPs are what `torch.utils.flop_counter` counts for a forward, and for a training step without gradient
checkpointing (whose recomputation is no useful work). `--peak-tflops` is the card's own dense number for the format.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from opd_ray.config import LoraConfig, ModelConfig
from opd_ray.console import console
from opd_ray.models.sd3 import SD3

GUIDANCE = 4.5
TEXT_TOKENS = 77 + 128


def configs(folder: Path, layers: int, heads: int) -> Path:
    """What the family reads of a checkpoint beside its weights."""
    transformer = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(min(13, layers))),
        "qk_norm": "rms_norm",
    }
    parts = {
        "transformer/config.json": transformer,
        "vae/config.json": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16},
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    }
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def load(args: argparse.Namespace, dtype: torch.dtype) -> SD3:
    """The family over random weights, with a student and three teachers."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = configs(Path(scratch), args.layers, args.heads)
        model = ModelConfig(path=str(folder), resolution=args.resolution)
        config = json.loads((folder / "transformer/config.json").read_text())
        with torch.device(args.device):
            network = SD3Transformer2DModel.from_config(config).to(dtype).requires_grad_(False).eval()
        family = SD3(model, network, text=None, vae=None, device=args.device, dtype=dtype)
    for seed, name in enumerate(("student", "geneval", "ocr", "aesthetic")):
        family.add_lora(name, LoraConfig(), seed)
    family.use("student")
    family.train_adapter("student")
    family.save_memory()
    return family


def seconds(work: Callable[[], None], repeats: int, device: str) -> float:
    """Median of several times, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def flops(family: SD3, work: Callable[[], None]) -> int:
    """Of one call, without what checkpointing computes again."""
    family.network.disable_gradient_checkpointing()
    with FlopCounterMode(display=False) as counter:
        work()
    family.save_memory()
    return counter.get_total_flops()


def main() -> None:
    """Time the roles and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="of the card, dense, in the format used")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--pictures", type=int, default=6, help="in a work item")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="also time a forward under torch.compile, which runs do not use"
    )
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    family = load(args, dtype)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(args.pictures, *family.latent_shape, generator=rng).to(args.device)
    widths = {"encoder_hidden_states": (TEXT_TOKENS, 4096), "pooled_projections": (2048,)}
    cond = {name: torch.randn(args.pictures, *shape, generator=rng).to(args.device) for name, shape in widths.items()}
    empty = {name: tensor[:1] for name, tensor in cond.items()}

    def draw() -> None:
        with torch.no_grad():
            family.velocity(x, 0.5, cond, empty, GUIDANCE)

    def switch() -> None:
        with family.adapter("ocr"):
            pass

    def train() -> None:
        family.velocity(x, 0.5, cond, empty, GUIDANCE).square().mean().backward()

    once = {role: flops(family, work) for role, work in (("forward", draw), ("training", train))}
    parameters = sum(p.numel() for name, p in family.network.named_parameters() if "lora_" not in name)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    console.print(
        f"{name}, {parameters / 1e9:.2f} G parameters, {args.resolution} px, {args.pictures} pictures, {dtype}"
    )
    console.print("| role | seconds a step | TFLOP/s | utilisation |\n|---|---|---|---|", markup=False)
    for role, work, kind in (("rollout, teacher", draw, "forward"), ("learner", train, "training")):
        each = seconds(work, args.repeats, args.device)
        rate = once[kind] / each / 1e12
        share = f"{100 * rate / args.peak_tflops:.0f} %" if args.peak_tflops else "–"  # noqa: RUF001
        console.print(f"| {role} | {each:.4f} | {rate:.2f} | {share} |", soft_wrap=True)
    console.print(f"a teacher's change of adapter, once an item: {seconds(switch, args.repeats, args.device):.3f} s")
    if args.compile:
        plain = seconds(draw, args.repeats, args.device)
        family.denoiser = torch.compile(family.denoiser)
        console.print(f"compiled, a forward takes {seconds(draw, args.repeats, args.device) / plain:.2f} of its time")
    if args.device == "cuda":
        console.print(
            f"peak memory of the denoiser with all adapters: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        )


if __name__ == "__main__":
    main()
