"""LoRA files: found, read, checked against a network, and written.

Two layouts are read: diffusers' (``transformer.<module>.lora_A.weight``, alpha in the header or as
``<module>.alpha``) and PEFT's folder (``base_model.model.<module>.lora_A.weight`` beside
adapter_config.json). A U-Net's begin with ``unet.``, and diffusers' training scripts write them with its older
endings, ``.lora.down.weight`` and ``.lora.up.weight``. Inside, a tensor goes by its canonical name,
``<module>.lora_A.weight``.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opd_ray.errors import ModelError
from opd_ray.models.checkpoint import refusing, resolve
from opd_ray.models.download import Source

__all__ = ["LoraFile", "LoraInfo", "check_fits", "read_lora", "strength", "write_lora"]

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
HEADER = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
A, B, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
OLDER = {".lora.down.weight": A, ".lora.up.weight": B}
TEXT_ENCODER = re.compile(rf"({re.escape(PEFT_PREFIX)})?(text_encoder(_\d)?|text_model)\.")
KOHYA = re.compile(r"^lora_|\.lora_(down|up)\.")
# What scales an adapter, and nothing else: others of PEFT's keys run code on the base weights.
SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """What was bound, for run.json and for messages."""

    name: str
    path: str
    """The file."""
    sha256: str
    """Of the file."""
    tensors: int
    """Bound tensors, which are all of the file's."""
    rank: int
    """The adapter's own; single modules may differ."""
    alpha: float
    """The adapter's own; single modules may differ."""


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA as read: tensors by canonical name, and how PEFT has to scale them."""

    name: str
    path: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """Keyword arguments of ``peft.LoraConfig``."""

    def __str__(self) -> str:
        return f"LoRA {self.name!r} ({self.path})"

    @property
    def modules(self) -> list[str]:
        """Names of the modules that it adapts, sorted."""
        return sorted({key.removesuffix(A) for key in self.tensors if key.endswith(A)})

    def info(self) -> LoraInfo:
        """The record of this file once it is bound."""
        rank, alpha = int(self.config["r"]), float(self.config["lora_alpha"])
        return LoraInfo(self.name, str(self.path), self.sha256, len(self.tensors), rank, alpha)


def find(name: str, path: str, revision: str | None, subfolder: str | None) -> Path:
    """The weights file of a LoRA: a file, or the one in a folder, a run folder or a hub repository."""
    place = Path(resolve(path))
    if (place / "run.json").is_file():
        path, place = str(place / "lora"), place / "lora"
    if place.is_file():
        return place
    what = f"LoRA {name!r}"
    source = Source(f"{what}: {path!r}", str(place), revision, subfolder)
    folder = source.fetch(WEIGHTS, PEFT_WEIGHTS, PEFT_CONFIG)
    for candidate in (folder / WEIGHTS, folder / PEFT_WEIGHTS):
        if candidate.is_file():
            return candidate
    top = PurePosixPath(subfolder or "")
    files = [PurePosixPath(file) for file in source.files()]
    others = [file.name for file in files if file.parent == top and file.suffix == ".safetensors"]
    if len(others) == 1:
        return source.fetch(others[0]) / others[0]
    if others:
        raise ModelError(f"{what}: {folder} has no {WEIGHTS} but {', '.join(others)}; give the path of the file")
    raise ModelError(f"{what} ({path}): {source.lacking('*.safetensors')}")


def read_lora(
    name: str,
    path: str,
    *,
    part: str = "transformer",
    revision: str | None = None,
    subfolder: str | None = None,
    alpha: float | None = None,
) -> LoraFile:
    """Read a LoRA of a pipeline's ``part`` without a network. ``alpha`` is for a file that does not say its own.

    Raises:
        ModelError: no such file, not safetensors, no tensor of a LoRA in it, a delta that is zero
            everywhere, or a strength (alpha) that is written nowhere, or otherwise than given.
    """
    file = find(name, path, revision, subfolder)
    what = f"LoRA {name!r} ({file})"
    with refusing(f"{what} cannot be read"):
        with safe_open(file, framework="pt", device="cpu") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
            header = content.metadata() or {}
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        _require_known(what, part, tensors)
        is_peft = any(key.startswith(PEFT_PREFIX) for key in tensors)
        if is_peft and not (file.parent / PEFT_CONFIG).is_file():
            raise ModelError(
                f"{what} is of a PEFT folder, whose {PEFT_CONFIG} is not beside it: its alpha is written there. "
                "Give the folder that save_pretrained wrote"
            )
        told = (file.parent / PEFT_CONFIG).read_text(encoding="utf-8") if is_peft else header.get(HEADER)
        packed = json.loads(told or "{}")
        if not isinstance(packed, dict):
            raise ValueError(f"{PEFT_CONFIG if is_peft else HEADER} holds a {type(packed).__name__}, not a mapping")
        written = {key.removeprefix(f"{part}."): value for key, value in packed.items()}
    prefix = PEFT_PREFIX if is_peft else f"{part}."
    tensors = {_canonical(key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}
    alphas = {key: tensors.pop(key) for key in list(tensors) if key.endswith(ALPHA)}
    config = _scaling(what, part, written, tensors, alphas, alpha)
    _require_pairs(what, part, tensors)
    broken = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ModelError(f"{what} has NaN or infinite values in {len(broken)} tensors, the first is {min(broken)!r}")
    found = LoraFile(name, file, sha256, tensors, config)
    if not any(_changes(found, module) for module in found.modules):
        raise ModelError(f"{what} changes nothing: alpha, lora_A or lora_B are zero everywhere")
    return found


def _canonical(key: str) -> str:
    """With today's ending; keys of PEFT's layout have it already."""
    for older, today in OLDER.items():
        if key.endswith(older):
            return key.removesuffix(older) + today
    return key


def _require_known(what: str, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse, by what they are, the layouts that are known and not read."""
    text = sorted(key for key in tensors if TEXT_ENCODER.match(key))
    if text:
        raise ModelError(
            f"{what} also adapts text encoders, which are frozen here: {len(text)} of {len(tensors)} tensors, the "
            f"first is {text[0]!r}. Save the {part}'s alone (save_lora_weights({part}_lora_layers=...))"
        )
    other = {"transformer": "unet", "unet": "transformer"}.get(part)
    if tensors and all(key.startswith(f"{other}.") for key in tensors):
        raise ModelError(
            f"{what} binds 0 of {len(tensors)} tensors: it adapts a {other} (the first is {min(tensors)!r}), and this "
            f"model has a {part}. It was made for another architecture"
        )
    kohya = sorted(key for key in tensors if KOHYA.search(key))
    if kohya:
        raise ModelError(
            f"{what} is in kohya's layout ({kohya[0]!r}), which is not read: convert it to diffusers' "
            f"({part}.<module>{A} and {B.removeprefix('.')}, <module>{ALPHA}) or PEFT's"
        )


def strength(file: LoraFile, module: str) -> float:
    """What PEFT multiplies the product B A of a module with: alpha / r, or alpha / sqrt(r) of rsLoRA."""
    from peft.utils.other import get_pattern_key

    rank, patterns = len(file.tensors[module + A]), file.config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), file.config["lora_alpha"]))
    return float(alpha / rank**0.5) if file.config.get("use_rslora") else alpha / rank


def _changes(file: LoraFile, module: str) -> bool:
    """Whether alpha B A of a module is other than zero."""
    down, up = file.tensors[module + A].float(), file.tensors[module + B].float()
    if up.shape[1] != len(down):
        return True  # no pair: whoever binds it says so
    return strength(file, module) != 0 and bool((up.flatten(1) @ down.flatten(1)).any())


def _require_pairs(what: str, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is one half of an A and B pair; anything else would be left unbound."""
    unbound = [
        key
        for key in tensors
        if not (key.endswith(A) and key.removesuffix(A) + B in tensors)
        and not (key.endswith(B) and key.removesuffix(B) + A in tensors)
    ]
    if unbound or not tensors:
        first = f"; the first of the others is {min(unbound)!r}" if unbound else ""
        raise ModelError(
            f"{what} would bind {len(tensors) - len(unbound)} of {len(tensors)} tensors{first}. "
            f"Known names: {part}.<module>{A} and {B.removeprefix('.')}, or PEFT's layout"
        )


def _scaling(
    what: str,
    part: str,
    written: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, Tensor],
    given: float | None,
) -> dict[str, Any]:
    """How PEFT has to scale the tensors, by the file's own word.

    A file that does not say is refused: diffusers would take alpha = rank, at whatever strength
    that happens to be.
    """
    if written.get("r") is not None and written.get("lora_alpha") is not None:
        if given not in {None, written["lora_alpha"]}:
            raise ModelError(f"{what} says alpha {written['lora_alpha']:g} itself; leave out the alpha {given:g}")
        return {key: written[key] for key in SCALING if written.get(key) is not None}
    ranks = {key.removesuffix(A): len(tensors[key]) for key in tensors if key.endswith(A)}
    values = {key.removesuffix(ALPHA): float(value) for key, value in alphas.items()}
    silent = sorted(ranks.keys() - values.keys())
    if given is not None:
        values |= dict.fromkeys(silent, given)
    elif silent:
        raise ModelError(
            f"{what} does not say its alpha, so its strength is unknown: {silent[0]} has none. "
            f"Save it again with its adapter metadata (save_lora_weights(..., "
            f"{part}_lora_adapter_metadata=config.to_dict())), or give the teacher's alpha"
        )
    return {
        "r": Counter(ranks.values()).most_common(1)[0][0] if ranks else 0,
        "lora_alpha": Counter(values.values()).most_common(1)[0][0] if values else 0.0,
        "rank_pattern": {f"^{module}": rank for module, rank in ranks.items()},
        "alpha_pattern": {f"^{module}": values[module] for module in ranks},
    }


def check_fits(file: LoraFile, network: nn.Module) -> None:
    """Every pair has a module of its shape in the network.

    Raises:
        ModelError: names the first module that is missing or has another shape.
    """
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    missing = [module for module in file.modules if module not in shapes]
    if missing:
        bound = len(file.tensors) - 2 * len(missing)
        raise ModelError(
            f"{file} binds {bound} of {len(file.tensors)} tensors: this model has no module "
            f"{missing[0]!r}. It was made for another architecture"
        )
    for module in file.modules:
        down, up, weight = file.tensors[module + A], file.tensors[module + B], shapes[module]
        if down.shape[1:] != weight[1:] or up.shape[0] != weight[0] or len(down) != up.shape[1]:
            raise ModelError(
                f"{file} does not fit: {module} is {list(weight)} here, its pair is "
                f"A {list(down.shape)} and B {list(up.shape)}. It was made for another architecture"
            )


def write_lora(folder: Path, weights: Mapping[str, Tensor], config: Any, *, part: str = "transformer") -> None:
    """Write diffusers' file with its adapter metadata, and a PEFT folder in ``folder/peft``.

    Args:
        folder: made if it is not there.
        weights: by canonical name.
        config: the ``peft.LoraConfig``; alpha and patterns travel with it.
        part: of the pipeline that it adapts.
    """
    plain = {
        key: sorted(value) if isinstance(value, set) else value  # sets have no order of their own
        for key, value in config.to_dict().items()
    }
    tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    peft = folder / "peft"
    peft.mkdir(parents=True, exist_ok=True)
    header = json.dumps({f"{part}.{key}": plain[key] for key in sorted(plain)})
    save_file(
        {f"{part}.{name}": tensor for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt", HEADER: header},
    )
    save_file(
        {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()},
        peft / PEFT_WEIGHTS,
        metadata={"format": "pt"},
    )
    text = json.dumps(plain, indent=2, sort_keys=True)
    (peft / PEFT_CONFIG).write_text(text + "\n", encoding="utf-8")
