"""Finding and loading the parts of a diffusers checkpoint, from a folder or a hub."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError

__all__ = ["load_component", "read_config", "refusing", "require_hub_id", "resolve"]

LONGEST_CAUSE = 300
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(path: str) -> str:
    """A model or LoRA path, with ``world`` and ``world/<name>`` as the packaged folders."""
    head, _, name = path.partition("/")
    if head != "world":
        return path
    from opd_ray import world

    with refusing(path):
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


def require_hub_id(path: str, what: str) -> None:
    """Refuse what is neither a folder here nor a name that a hub could have.

    Raises:
        ModelError: names it, before anything is asked of a network.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would hide the one line that counts
    if not HUB_ID.fullmatch(path):
        raise ModelError(f"{what}: there is no such file or folder, and it is no hub id (owner/name)")


def read_config(model: ModelConfig, file: str) -> dict[str, Any]:
    """One of the checkpoint's JSON files, such as ``scheduler/scheduler_config.json``.

    Raises:
        ModelError: neither a folder nor a hub repository that has the file.
    """
    place = resolve(model.path)
    local, what = Path(place).is_dir(), f"model {model.path!r}"
    if not local:
        require_hub_id(place, what)
    with refusing(f"{what} has no readable {file}" if local else f"{what} is no folder, nor on the hub with {file}"):
        if local:
            found = Path(place, model.subfolder or "", file)
        else:
            from huggingface_hub import hf_hub_download

            found = Path(hf_hub_download(place, file, subfolder=model.subfolder, revision=model.revision))
        content = json.loads(found.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected a mapping, found {type(content).__name__}")
        return content


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """No progress bars where nothing is downloaded: reading a file is too quick for them."""
    from transformers.utils import logging

    if not local or not logging.is_progress_bar_enabled():
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
        ModelError: it is missing, gated, not safetensors, or leaves a weight of ``kind`` unset.
    """
    what = f"model {model.path!r}: its {name} cannot be loaded as {kind.__name__}"
    with refusing(what), _quiet(Path(resolve(model.path)).is_dir()):
        component, info = kind.from_pretrained(
            resolve(model.path),
            subfolder="/".join(filter(None, (model.subfolder, name))),
            revision=model.revision,
            use_safetensors=True,
            output_loading_info=True,
            dtype=dtype,
            **options,
        )
    unset = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if unset:
        raise ModelError(f"{what}: {len(unset)} weights are not in it, the first is {unset[0]}")
    module: nn.Module = component.to(device, dtype).requires_grad_(False).eval()
    return module
