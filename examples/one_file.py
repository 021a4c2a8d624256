"""On-policy distillation of diffusion models (DiffusionOPD, arXiv 2605.15055) in one file: read it top to bottom.

Frozen specialists, each a LoRA over one Stable Diffusion 3 base, teach one student LoRA on the student's own drawings:

    x_{j+1} = x_j + dt_j v_S(x_j)                      the student draws: Eq. 5 without noise, no gradient
    mu_S, mu_T = x_j + dt_j v(x_j)                     both step from the *student's* states, Eq. 7 without noise
    L = mean_tasks mean_steps mean_{B,C,H,W} 1/2 |mu_S - mu_T|^2                                          Eq. 12

One optimizer step a round over all tasks. ``opd_ray`` does the same with workers, checkpoints, rewards and noise.
"""

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

WORLD = Path(__file__).resolve().parent.parent / "opd_ray" / "world" / "shipped"
TASKS = [("compose", 1.0), ("text", 1.0), ("look", 1.0)]  # and the guidance of each one's teacher
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
Conditioning = Mapping[str, Tensor]  # by the transformer's argument name, each [B, ...]


@dataclass(frozen=True)
class Batch:
    """One task's part of a round."""

    prompts: Sequence[str]  # B
    noise: Tensor  # [B, C, H, W], the states x_0
    steps: Sequence[int]  # the trained j


def load(model: str, teachers: Mapping[str, str], rank: int, alpha: float) -> StableDiffusion3Pipeline:
    """The base, a LoRA for each teacher, and a fresh one called `student` (A normal, B zero: it starts as the base)."""
    index = StableDiffusion3Pipeline.load_config(model)
    absent = {name: None for name, part in index.items() if part == [None, None]}  # T5, where it was left out
    pipe = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32, **absent)
    pipe.transformer.requires_grad_(False)
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
    for name, folder in teachers.items():
        pipe.transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    targets = [f"attn.{name}" for name in ATTENTION]
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
    pipe.transformer.add_adapter(config, "student")
    pipe.transformer.set_adapter("student")
    return pipe


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, prompts: Sequence[str]) -> Conditioning:
    """What the text encoders make of the prompts."""
    length = min(128, pipe.tokenizer_3.model_max_length) if pipe.tokenizer_3 else 128
    states, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def velocity(
    pipe: StableDiffusion3Pipeline, x: Tensor, t: Tensor, cond: Conditioning, empty: Conditioning, guidance: float
) -> Tensor:
    """Guided velocity v + (g - 1) (v - v_empty), [B, C, H, W], of the adapter in use; both branches carry gradient."""
    if guidance == 1:
        return pipe.transformer(x, timestep=(1000 * t).expand(len(x)), return_dict=False, **cond)[0]
    both = {name: torch.cat([empty[name].expand_as(value), value]) for name, value in cond.items()}
    answer = pipe.transformer(x.repeat(2, 1, 1, 1), timestep=(1000 * t).expand(2 * len(x)), return_dict=False, **both)
    without, given = answer[0].chunk(2)
    return given + (guidance - 1) * (given - without)


def distil(
    pipe: StableDiffusion3Pipeline, teacher: str, teacher_guidance: float, guidance: float, sigmas: Tensor, batch: Batch
) -> Iterator[Tensor]:
    """Eq. 12 of one task, one loss for each trained step. ``sigmas`` [N + 1] fall from 1 (noise) to 0 (picture)."""
    cond, empty = encode(pipe, batch.prompts), encode(pipe, [""])
    dt = sigmas.diff()
    with torch.no_grad():
        states = [batch.noise]
        for j in range(max(batch.steps)):  # nobody looks at the picture
            states.append(states[j] + dt[j] * velocity(pipe, states[j], sigmas[j], cond, empty, guidance))
        pipe.transformer.set_adapter(teacher)
        marks = {j: velocity(pipe, states[j], sigmas[j], cond, empty, teacher_guidance) for j in batch.steps}
        pipe.transformer.set_adapter("student")  # PEFT makes the adapter in use, and no other, trainable
    for j, mark in marks.items():
        student = states[j] + dt[j] * velocity(pipe, states[j], sigmas[j], cond, empty, guidance)
        yield 0.5 * (student - (states[j] + dt[j] * mark)).square().mean()


def train_round(
    pipe: StableDiffusion3Pipeline,
    optimizer: torch.optim.Optimizer,
    batches: Mapping[str, Batch],
    teacher_guidance: Mapping[str, float],
    guidance: float,
    sigmas: Tensor,
) -> dict[str, float]:
    """One optimizer step over all tasks; returns each task's loss."""
    optimizer.zero_grad()
    losses = dict.fromkeys(batches, 0.0)
    for task, batch in batches.items():
        for loss in distil(pipe, task, teacher_guidance[task], guidance, sigmas, batch):
            (loss / len(batches) / len(batch.steps)).backward()
            losses[task] += loss.item() / len(batch.steps)
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return losses


def student_parameters(pipe: StableDiffusion3Pipeline) -> dict[str, torch.nn.Parameter]:
    """By name, ``...attn.to_q.lora_A.student.weight``."""
    return {name: p for name, p in pipe.transformer.named_parameters() if ".student." in name}


def save(pipe: StableDiffusion3Pipeline, folder: str) -> None:
    """For ``pipe.load_lora_weights(folder)``; without the metadata its alpha would be lost."""
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="student")
    config = pipe.transformer.peft_config["student"].to_dict()
    pipe.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config)


def read_prompts(file: str) -> list[str]:
    """A prompt a line, or JSON lines with a `prompt`."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] if file.endswith(".jsonl") else line for line in lines if line.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Distil; print each task's loss and the rate."""
    world = [[name, f"{WORLD}/lora/{name}", f"{WORLD}/prompts/{name}_train.jsonl", g] for name, g in TASKS]
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=f"{WORLD}/pipeline", help="a Stable Diffusion 3 pipeline")
    parser.add_argument("--task", nargs=4, action="append", metavar=("NAME", "LORA", "PROMPTS", "GUIDANCE"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--images", type=int, default=24, help="of each task in a round")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps N; the first int(0.99 N) are trained")
    parser.add_argument("--guidance", type=float, default=1.25, help="the student's")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=float, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="student", help="folder of the student's LoRA")
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    tasks = args.task or world
    guidance = {name: float(scale) for name, _, _, scale in tasks}
    prompts = {name: itertools.cycle(read_prompts(file)) for name, _, file, _ in tasks}
    pipe = load(args.model, {name: lora for name, lora, _, _ in tasks}, args.rank, args.alpha)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(args.steps)
    config, trained = pipe.transformer.config, range(int(0.99 * args.steps))
    shape = (args.images, config.in_channels, config.sample_size, config.sample_size)
    optimizer = torch.optim.AdamW(student_parameters(pipe).values(), args.lr, weight_decay=1e-4)
    for number in range(args.rounds):
        start = time.perf_counter()
        batches = {
            name: Batch(list(itertools.islice(prompts[name], args.images)), torch.randn(shape), trained)
            for name in guidance
        }
        losses = train_round(pipe, optimizer, batches, guidance, args.guidance, pipe.scheduler.sigmas)
        rate = args.images * len(tasks) / (time.perf_counter() - start)
        shown = "  ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
        print(f"round {number:3}  {shown}  {rate:.1f} images/s", flush=True)
    save(pipe, args.out)


if __name__ == "__main__":
    main()
