"""A tiny world to distil in: 32x32 pictures, English captions, three tasks, shipped weights.

Light to import: paths and names alone. The scorers are in `opd_ray.world.scorers`, and
`python -m opd_ray.world build` makes every shipped file again from nothing.
"""

from pathlib import Path

TASKS = ("compose", "text", "look")
"""The tasks that have a specialist. `mixed` captions ask for two of them at once."""
SCORERS = ("compose", "compose_partial", "text", "look")
"""The functions of `opd_ray.world.scorers`."""
UNETS = ("unet", "few")
"""Bases that predict noise: of fifty steps, and of the same distilled to four."""
SPLITS = (
    *((task, "train") for task in TASKS),
    *((task, "heldout") for task in (*TASKS, "mixed")),
)
"""The shipped prompt files, as (task, split). `mixed` is never distilled on."""

_SHIPPED = Path(__file__).parent / "shipped"


def pipeline_path(name: str = "pipeline") -> Path:
    """The base, a folder for `StableDiffusion3Pipeline.from_pretrained`; those of UNETS for StableDiffusionPipeline."""
    return _SHIPPED / name


def lora_path(name: str) -> Path:
    """A specialist's folder, for `pipe.load_lora_weights`. ``name`` is one of TASKS."""
    if name not in TASKS:
        raise ValueError(f"world has no specialist {name!r}. Known: {', '.join(TASKS)}; models: {', '.join(UNETS)}.")
    return _SHIPPED / "lora" / name


def prompt_file(task: str, split: str) -> str:
    """A prompt file's place below a world's folder."""
    return f"prompts/{task}_{split}.jsonl"


def prompts_path(task: str, split: str) -> Path:
    """A shipped prompt file; its rows are {"prompt": ..., "task": ...}."""
    if (task, split) not in SPLITS:
        known = ", ".join("/".join(pair) for pair in SPLITS)
        raise ValueError(f"world has no prompts {task}/{split}. Known: {known}.")
    return _SHIPPED / prompt_file(task, split)


def shipped_files() -> list[Path]:
    """Every file of the base, the specialists and the prompts."""
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    parts = {
        **dict.fromkeys(encoders, ("config.json", "model.safetensors")),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), ("tokenizer.json", "tokenizer_config.json")),
        **dict.fromkeys(("transformer", "vae"), ("config.json", "diffusion_pytorch_model.safetensors")),
        "scheduler": ("scheduler_config.json",),
    }
    plain = ("text_encoder", "tokenizer", "vae", "scheduler")
    weights = ("config.json", "diffusion_pytorch_model.safetensors")
    return [
        pipeline_path() / "model_index.json",
        *(pipeline_path() / part / name for part, names in parts.items() for name in names),
        *(pipeline_path(one) / "model_index.json" for one in UNETS),
        *(pipeline_path(one) / "unet" / name for one in UNETS for name in weights),
        *(pipeline_path(one) / part / name for one in UNETS for part in plain for name in parts[part]),
        *(lora_path(task) / "pytorch_lora_weights.safetensors" for task in TASKS),
        *(prompts_path(task, split) for task, split in SPLITS),
    ]


def record_path() -> Path:
    """What the shipped files were made with, and their scores."""
    return Path(__file__).parent / "record.json"
