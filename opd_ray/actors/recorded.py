"""The recorded actor: reads experience that was recorded earlier, in place of drawing it."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opd_ray.errors import PromptError

__all__ = ["RecordedActor", "recordings"]


def recordings(folder: str) -> dict[str, tuple[str, ...]]:
    """The files of a recorded data set by task: ``<folder>/<task>/<name>.safetensors``, a work item each.

    Raises:
        PromptError: the folder has none.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        found.setdefault(path.parent.name, []).append(path.name)
    if not found:
        raise PromptError(f"{folder}: no recorded experience; expected <task>/<name>.safetensors")
    return {task: tuple(names) for task, names in found.items()}


class RecordedActor:
    """Reads one file for each work item."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def read(self, task: str, name: str) -> Mapping[str, Tensor]:
        """The tensors of one recording; what they mean is between who recorded and the algorithm.

        Raises:
            PromptError: it cannot be read.
        """
        path = self.folder / task / name
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise PromptError(f"recorded experience {path} cannot be read ({error})") from None
