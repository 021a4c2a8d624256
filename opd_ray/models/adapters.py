"""LoRA adapters on one network, always unmerged, through PEFT as diffusers hosts it; or its own weights, to train.

PEFT turns requires_grad on for whatever adapter it activates. Here activation and trainability are
two things: only ``train_adapter`` changes what is trainable.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_ray.config import ATTENTION, LoraConfig
from opd_ray.errors import ModelError
from opd_ray.models.checkpoint import refusing
from opd_ray.models.lora import B, LoraFile, LoraInfo, check_fits, read_lora, strength, write_lora
from opd_ray.seeds import generator

__all__ = ["Adapters"]


class Adapters:
    """The adapters of ``network``, by name. None stands for the base: every adapter off."""

    network: Any
    """The denoiser itself, without what an engine may put around it."""

    def __init__(self, network: nn.Module, *, part: str = "transformer", targets: tuple[str, ...] = ATTENTION) -> None:
        """Over a network that has none.

        Args:
            network: diffusers' denoiser.
            part: what its tensors' names begin with in a LoRA file for the pipeline: `transformer` or `unet`.
            targets: module name endings that get a fresh adapter where its configuration does not say.
        """
        self.network = network
        self._part, self._targets = part, targets
        self._slots: dict[str, str] = {}
        """Name -> PEFT's name for it. PEFT allows no dots and no name of an nn.Module attribute."""
        self._own: str | None = None
        """The name that stands for the network's own weights."""
        self._num_made = 0
        self._active: str | None = None

    @property
    def active(self) -> str | None:
        """The adapter in use; None is the base."""
        return self._active

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they came."""
        return tuple(self._slots)

    def add_lora(self, name: str, lora: LoraConfig, seed: int) -> None:
        """Add a fresh adapter: A normal with std 1 / rank, B zero, float32, frozen until trained; or as `start` is.

        Args:
            name: not yet taken.
            lora: rank, alpha and module name endings; the network's own endings where it names none.
            seed: each A is drawn from (seed, its canonical name); the global RNG is left alone.

        Raises:
            ModelError: the name is taken, a target is the ending of no linear layer's name, or `start` is of another
                rank or has other targets.
        """
        import peft

        linear = [key for key, module in self._hosts() if isinstance(module, nn.Linear)]
        targets = self._targets if lora.targets is None else lora.targets
        idle = [target for target in targets if not any(key == target or key.endswith(f".{target}") for key in linear)]
        if idle or not targets:
            raise ModelError(
                f"LoRA {name!r}: targets {', '.join(idle) or '(none given)'} match no linear "
                f"layer; endings here: {', '.join(sorted({_ending(key) for key in linear}))}"
            )
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=sorted(targets),
            init_lora_weights="gaussian",
        )
        with self._new_slot(name) as slot:
            self.network.add_adapter(config, slot)
            self._in_float32(name)
            if lora.start is not None:
                self._start(name, lora, lora.start)
                return
        with torch.no_grad():
            for key, parameter in self.adapter_parameters(name).items():
                if key.endswith(".lora_A.weight"):
                    noise = torch.randn(parameter.shape, generator=generator(seed, "lora", key))
                    parameter.copy_(noise / lora.rank)

    @torch.no_grad()
    def _start(self, name: str, lora: LoraConfig, path: str) -> None:
        """Take over what a LoRA changes; B takes what its strength differs by."""
        file = read_lora(name, path, part=self._part)
        own = self.adapter_parameters(name)
        differ = own.keys() ^ file.tensors.keys() or {
            key for key, tensor in file.tensors.items() if own[key].shape != tensor.shape
        }
        if differ:
            endings = ", ".join(sorted({_ending(module) for module in file.modules}))
            raise ModelError(
                f"student.lora.start: {file} has other modules or another rank than student.lora, the first is "
                f"{min(differ)}; set rank {file.config['r']} and targets {endings}"
            )
        for key, parameter in own.items():
            factor = strength(file, key.removesuffix(B)) * lora.rank / lora.alpha if key.endswith(B) else 1.0
            parameter.copy_(factor * file.tensors[key].float())

    def add_own(self, name: str) -> None:
        """Let a name stand for the network's own weights, in float32, as ``add_lora`` does for an adapter.

        There is one copy of them: no adapter goes over them any more, and the base is what they are now.

        Raises:
            ModelError: there is an adapter, or another such name, already.
        """
        if self._slots or self._own:
            taken = ", ".join([*self._slots, *filter(None, [self._own])])
            raise ModelError(f"{name!r}: all weights of the network cannot be trained beside {taken}")
        self._own = name
        self._in_float32(name)

    def load_lora(
        self,
        name: str,
        path: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        alpha: float | None = None,
    ) -> LoraInfo:
        """Add a frozen adapter from a file, and prove that all of it is bound.

        Args:
            name: not yet taken.
            path: a file, folder or hub id in diffusers' or PEFT's layout, or ``world/<name>``.
            revision: of a hub repository.
            subfolder: of the folder or repository.
            alpha: where the file does not say its own.

        Raises:
            ModelError: the name is taken, or the file is missing, says no alpha, changes nothing,
                or does not fit this network to the last tensor. Nothing is left behind.
        """
        file = read_lora(name, path, part=self._part, revision=revision, subfolder=subfolder, alpha=alpha)
        check_fits(file, self.network)
        config = {**file.config, "target_modules": file.modules}
        with refusing(str(file)), self._new_slot(name) as slot:
            self.network.load_lora_adapter(dict(file.tensors), prefix=None, adapter_name=slot, metadata=config)
            self._in_float32(name, file.tensors)
            self._require_bound(name, file)
        return file.info()

    def _in_float32(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """PEFT makes an adapter in its base's number format; what that rounded is read again."""
        for key, parameter in self.adapter_parameters(name).items():
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
                if tensors is not None and key in tensors:
                    parameter.data.copy_(tensors[key])

    def _require_bound(self, name: str, file: LoraFile) -> None:
        """Read the parameters back: as many as the file has, and each equal to its tensor."""
        parameters = self.adapter_parameters(name)
        bound = [
            key
            for key, tensor in file.tensors.items()
            if key in parameters and torch.equal(parameters[key].cpu(), tensor.float())
        ]
        if len(bound) != len(file.tensors) or len(parameters) != len(file.tensors):
            raise ModelError(
                f"{file} has {len(file.tensors)} tensors; {len(bound)} are bound to the model's {len(parameters)}"
            )

    def remove_adapter(self, name: str) -> None:
        """Delete an adapter that is not in use."""
        if name == self._active:
            raise ModelError(f"adapter {name!r} is in use; use another before it is removed")
        self._slot(name)  # it has to be there
        with self._keeping_trainability():
            self._delete(name)

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Use one adapter inside the block; then everything is as before, also on an exception."""
        before = self._active
        with self._keeping_trainability():
            self._activate(name)
            try:
                yield
            finally:
                self._activate(before)

    def use(self, name: str | None) -> None:
        """Use one adapter from now on. What is trainable stays as it is."""
        self._activate(name)

    def train_adapter(self, *names: str) -> None:
        """Make these adapters' parameters the only trainable ones."""
        chosen = [parameter for name in names for parameter in self.adapter_parameters(name).values()]
        self.network.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The live parameters by canonical name, sorted.

        A canonical name has neither the adapter's nor a backend's name in it:
        ``transformer_blocks.0.attn.to_q.lora_A.weight``.
        """
        if name == self._own:
            return dict(sorted(self.network.named_parameters()))
        part = f".{self._slot(name)}."
        found = {key.replace(part, "."): parameter for key, parameter in self.network.named_parameters() if part in key}
        return dict(sorted(found.items()))

    def save_lora(self, name: str, folder: Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write an adapter so that stock diffusers, and stock PEFT, load it at its full strength.

        Args:
            name: the adapter.
            folder: gets pytorch_lora_weights.safetensors, and PEFT's layout in ``peft``.
            weights: by canonical name, instead of the live parameters (for an average of them).

        Raises:
            ValueError: ``weights`` are not this adapter's, by name and shape.
        """
        live: Mapping[str, Tensor] = self.adapter_parameters(name)
        chosen = live if weights is None else weights
        # DeepSpeed's ZeRO-3 leaves a parameter empty between forwards, and its shape in ds_shape.
        shapes = {key: getattr(parameter, "ds_shape", parameter.shape) for key, parameter in live.items()}
        wrong = live.keys() ^ chosen.keys() or {key for key in live if shapes[key] != chosen[key].shape}
        if wrong:
            raise ValueError(f"weights of {name!r} differ in name or shape: {min(wrong)}")
        write_lora(Path(folder), chosen, self.network.peft_config[self._slot(name)], part=self._part)

    def _hosts(self) -> list[tuple[str, nn.Module]]:
        """The network's own modules, without what adapters put inside them."""
        return [
            (key, getattr(module, "base_layer", module))
            for key, module in self.network.named_modules()
            if not re.search(r"\.(base_layer|lora_\w+)(\.|$)", key)
        ]

    def _slot(self, name: str) -> str:
        if name not in self._slots:
            raise ModelError(f"no adapter {name!r}; there are {', '.join(self._slots) or 'none'}")
        return self._slots[name]

    @contextmanager
    def _new_slot(self, name: str) -> Iterator[str]:
        """A name for PEFT to fill. Afterwards the new adapter is frozen and not in use."""
        if name in self._slots:
            raise ModelError(f"LoRA {name!r}: there is an adapter of that name already")
        if self._own is not None:
            raise ModelError(f"LoRA {name!r}: this network's own weights are {self._own}'s, so nothing goes over them")
        slot = f"slot{self._num_made:04d}"
        self._num_made += 1
        self._slots[name] = slot
        # PEFT draws from the global RNG even where a file's tensors follow.
        with self._keeping_trainability(), torch.random.fork_rng(devices=[]), _meant():
            bound = False
            try:
                yield slot
                bound = True
            finally:
                if not bound:
                    self._delete(name)
                self._activate(self._active)
                for key, parameter in self.network.named_parameters():
                    if f".{slot}." in key:
                        parameter.requires_grad_(False)

    def _delete(self, name: str) -> None:
        with _meant():
            self.network.delete_adapters(self._slots.pop(name))

    @contextmanager
    def _keeping_trainability(self) -> Iterator[None]:
        before = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        try:
            yield
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)

    def _activate(self, name: str | None) -> None:
        slot = None if name is None or name == self._own else self._slot(name)
        with self._keeping_trainability():
            if slot is not None:
                self.network.set_adapter(slot)
                self.network.enable_adapters()
            elif self._slots:
                self.network.disable_adapters()
        self._active = name


def _ending(key: str) -> str:
    """The last words of a module's name, from the last one that is not a number on."""
    words = key.split(".")
    return ".".join(words[-2:]) if words[-1].isdigit() else words[-1]


@contextmanager
def _meant() -> Iterator[None]:
    """Silence what PEFT warns of and what is meant here: a second adapter, another one in use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="Adapter slot.* was active which is now deleted")
        yield
