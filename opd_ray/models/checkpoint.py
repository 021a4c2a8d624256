"""Finding and loading the parts of a diffusers checkpoint, from a folder or a hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError
from opd_ray.models.download import Source

__all__ = [
    "check_complete",
    "fetch_part",
    "load_component",
    "load_folder",
    "read_config",
    "refusing",
    "resolve",
    "weight_files",
]

LONGEST_CAUSE = 500
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""The two names that transformers and diffusers give to what they load, whole or with an index of its shards."""
WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
FILES = ("safetensors", "json", "txt", "model")
"""Endings of what a part may need; anything else of it is not downloaded."""


def resolve(path: str) -> str:
    """A model or LoRA path, with ``world`` and ``world/<name>`` as the packaged folders."""
    head, _, name = path.partition("/")
    if head != "world":
        return path
    from opd_ray import world

    with refusing(path):
        if name in world.UNETS:
            return str(world.pipeline_path(name))
        return str(world.lora_path(name) if name else world.pipeline_path())


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn what the loaders raise on a missing or foreign file into a one-line ModelError."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{what}: {cause[:LONGEST_CAUSE]}") from error


def source_of(model: ModelConfig) -> Source:
    """Where a model's files are."""
    return Source(f"model {model.path!r}", resolve(model.path), model.revision, model.subfolder)


def read_config(model: ModelConfig, file: str) -> dict[str, Any]:
    """One of the checkpoint's JSON files, such as ``scheduler/scheduler_config.json``.

    Raises:
        ModelError: neither a folder nor a hub repository that has the file.
    """
    source = source_of(model)
    with refusing(f"model {model.path!r} has no readable {file}"):
        found = source.fetch(file) / file
        if not found.is_file():
            raise FileNotFoundError(source.lacking(file))
        content = json.loads(found.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping, found {type(content).__name__}")
        return content


def fetch_part(model: ModelConfig, name: str) -> Path:
    """The folder of one part of the checkpoint, downloaded where the model is on a hub.

    Raises:
        ModelError: neither a folder nor a hub repository that can be read.
    """
    return source_of(model).fetch(*(f"{name}/*.{kind}" for kind in FILES)) / name


def check_complete(model: ModelConfig) -> None:
    """Whether every part of a checkpoint that lies here has all of its weights, by their headers alone.

    Raises:
        ModelError: names the part and the file that is missing or cut short.
    """
    place = Path(resolve(model.path), model.subfolder or "")
    if not place.is_dir():
        return  # of a hub: downloaded by whoever loads it
    for name, kind in read_config(model, "model_index.json").items():
        match kind:
            case [str(), str(made)] if not made.endswith(WEIGHTLESS):
                with refusing(f"model {model.path!r}: its {name} is not whole"):
                    weight_files(place / name)


def weight_files(part: Path) -> list[Path]:
    """The files that hold a part's weights, each of them whole.

    Raises:
        OSError, ValueError: what a download that broke off leaves behind, by the file's name.
    """
    if not (part / "config.json").is_file():
        raise FileNotFoundError(f"{part / 'config.json'} is missing")
    files = [part / name for name in WEIGHTS if (part / name).is_file()]
    for index in () if files else [part / f"{name}.index.json" for name in WEIGHTS]:
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (KeyError, ValueError, TypeError, AttributeError):
                raise ValueError(f"{index} has no weight_map: download it again") from None
            files = [part / shard for shard in sorted(shards)]
    if not files:
        others = ", ".join(sorted(file.name for file in part.glob("*.bin")))
        pickled = f"; {others} may hold code and is not loaded: save with safe_serialization=True" if others else ""
        raise FileNotFoundError(f"{part} has config.json but neither {' nor '.join(WEIGHTS)}{pickled}")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, one of {len(files)} shards: download the rest")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{file} is cut short, or a Git LFS pointer ({error}): download or copy it again"
            ) from error
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: reading a file is too quick for them."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def load_component(
    kind: Any, model: ModelConfig, name: str, device: str, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """One part of the checkpoint, frozen, in eval mode, every weight from the file.

    Args:
        kind: a diffusers or transformers model class.
        model: the checkpoint.
        name: its folder in the checkpoint, such as ``transformer``.
        device: where it goes.
        dtype: what its weights are kept in.
        options: further arguments of ``from_pretrained``.

    Raises:
        ModelError: it is missing, gated, cut short, not safetensors, or leaves a weight of ``kind`` unset.
    """
    what = f"model {model.path!r}: its {name}"
    with refusing(f"{what} cannot be loaded as {kind.__name__}"):
        part = fetch_part(model, name)
    return load_folder(what, kind, part, device, dtype, **options)


def load_folder(
    what: str, kind: Any, part: Path, device: str, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """What a folder with a configuration and weights holds, frozen, in eval mode, every weight from the file.

    Args:
        what: for messages: whose files they are.
        kind: a diffusers or transformers model class.
        part: the folder.
        device: where it goes.
        dtype: what its weights are kept in.
        options: further arguments of ``from_pretrained``.

    Raises:
        ModelError: a file is cut short, or not safetensors, or leaves a weight of ``kind`` unset.
    """
    what = f"{what} cannot be loaded as {kind.__name__}"
    with refusing(what), _quiet():
        weight_files(part)
        component, info = kind.from_pretrained(
            part, use_safetensors=True, output_loading_info=True, dtype=dtype, **options
        )
    missing, foreign = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        raise ModelError(f"{what}: {len(missing)} weights are not in it, the first is {missing[0]}")
    for key, theirs, ours in foreign:
        raise ModelError(f"{what}: {key} is {list(theirs)}, expected {list(ours)}: it is of another architecture")
    module: nn.Module = component.to(device).requires_grad_(False).eval()
    return module
