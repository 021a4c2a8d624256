"""Weights that are published as one file, often as a .pt or .pth: read without executing anything.

The one place that unpickles, and only tensors and plain containers (``weights_only=True``).
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from opd_ray.errors import ModelError
from opd_ray.models.checkpoint import refusing
from opd_ray.models.download import Source

__all__ = ["Published", "fit", "hashed", "read_published"]

WRAPPED = "state_dict"
"""Where training scripts put the weights in a file that holds more."""
# What torch.load raises for a file that would execute something; its module is banned here by name.
UNSAFE = cast(type[Exception], vars(torch.serialization)["pickle"].UnpicklingError)


@dataclass(frozen=True, slots=True)
class Published:
    """What one file held."""

    what: str
    """For messages: whose weights, and of which file."""
    path: Path
    sha256: str
    tensors: dict[str, Tensor]


def read_published(what: str, place: str, file: str, revision: str | None = None) -> Published:
    """The tensors of one file by name, on the CPU.

    Args:
        what: for messages: whose weights they are.
        place: the file itself, or a folder or hub repository that has ``file``.
        file: its name there.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelError: no such file, one that would execute something, or that holds something else than tensors.
    """
    path = Path(place)
    if not path.is_file():
        source = Source(f"{what} {place!r}", place, revision)
        path = source.fetch(file) / file
        if not path.is_file():
            raise ModelError(f"{what} {place!r}: {source.lacking(file)}")
    what = f"{what} ({path})"
    content = _content(what, path)
    wrapped = content.get(WRAPPED) if isinstance(content, Mapping) else None
    tensors = wrapped if isinstance(wrapped, Mapping) else content
    if not isinstance(tensors, Mapping) or not all(isinstance(one, Tensor) for one in tensors.values()) or not tensors:
        raise ModelError(
            f"{what} holds no tensors by name, neither at its top nor under {WRAPPED!r}: save model.state_dict()"
        )
    return Published(what, path, hashed(path), dict(tensors))


def _content(what: str, path: Path) -> Any:
    with refusing(f"{what} cannot be read"):
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  (the one loader)
        except (UNSAFE, EOFError, AttributeError) as error:
            raise ModelError(
                f"{what} is no file of plain tensors ({str(error).splitlines()[0][:120]}), and nothing else is loaded: "
                "download it again, or save model.state_dict() as safetensors"
            ) from error


def hashed(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fit(module: nn.Module, tensors: Mapping[str, Tensor], what: str, ignored: Collection[str] = ()) -> None:
    """Copy tensors into a module that has exactly these, in its own dtype.

    Args:
        module: whose parameters and buffers are set.
        tensors: by the module's own names.
        what: for messages: whose weights they are.
        ignored: names that may be among ``tensors`` and are not the module's.

    Raises:
        ModelError: names the first tensor that is missing, too many, or of another shape.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    if missing:
        raise ModelError(f"{what} lacks {len(missing)} of {len(own)} tensors, the first is {missing[0]}")
    more = sorted(tensors.keys() - own.keys() - set(ignored))
    if more:
        raise ModelError(
            f"{what} has {len(more)} tensors that {type(module).__name__} has no place for, the first is {more[0]}"
        )
    for name, place in own.items():
        if tensors[name].shape != place.shape:
            raise ModelError(f"{what}: {name} is {list(tensors[name].shape)}, expected {list(place.shape)}")
    module.load_state_dict({name: tensors[name] for name in own})
