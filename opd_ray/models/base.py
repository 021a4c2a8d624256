"""What a model family is, and how one is found.

A family writes ``load``, ``encode``, ``predict``, ``decode``, ``encode_images``, ``random_conditioning``
and ``fingerprint``; guidance, counting and adapters come from here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from opd_ray import plugins
from opd_ray.config import ATTENTION, LoraConfig, ModelConfig, StudentConfig, TeacherConfig
from opd_ray.diffusion import guide
from opd_ray.errors import ConfigError, ModelError
from opd_ray.models.adapters import Adapters
from opd_ray.models.checkpoint import refusing, resolve, weight_files
from opd_ray.models.lora import check_fits, read_lora
from opd_ray.models.schedule import Schedule, read_flow_schedule
from opd_ray.types import Conditioning

__all__ = [
    "FAMILIES",
    "Family",
    "Shape",
    "check_adapters",
    "check_lora",
    "count_numbers",
    "family_class",
    "load_family",
    "read_shift",
    "resolve",
    "sigmas_of",
    "trained_folder",
]

FAMILIES = {
    "sd3": "opd_ray.models.sd3:SD3",
    "sd": "opd_ray.models.unet:SD",
    "sdxl": "opd_ray.models.unet:SDXL",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory and time depend on."""

    parameters: Mapping[str, int]
    """Of each part: denoiser, text, vae."""
    layers: int
    """Blocks of the denoiser."""
    width: int
    tokens: int
    """That a block attends over, for one picture with its prompt."""
    pixels: int
    """Height and width of a picture."""
    latent: int
    """Numbers in one state of one picture."""
    conditioning: int
    """Numbers in one prompt's embeddings."""
    buffers: int = 0
    """Those of the denoiser's numbers that are no weights, such as position embeddings: never trained nor spread."""


class Family(Adapters, ABC):
    """One base model (text encoders, denoiser, VAE), frozen, with float32 adapters on top.

    Denoiser and text encoders compute in ``dtype``, under autocast; latents, velocities and the VAE are float32.
    """

    denoiser_part: ClassVar[str] = "transformer"
    """The denoiser's folder in a checkpoint, and the first word of its tensors' names in a LoRA file."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    """What student.lora.targets stands for where it is not given: endings of linear layers' names."""
    schedule: Schedule
    denoiser: nn.Module
    """What ``predict`` calls: the network, or what the learner's engine has put around it."""
    latent_shape: tuple[int, int, int]
    """C, H, W."""
    encodes: bool
    """Whether its text encoders were loaded."""
    forwards: int
    """Rows that went through the denoiser so far; a guided image counts two."""

    def __init__(
        self,
        model: ModelConfig,
        network: nn.Module,
        *,
        latent_shape: tuple[int, int, int],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(network, part=self.denoiser_part, targets=self.lora_targets)
        self.model = model
        self.denoiser = network
        self.latent_shape = latent_shape
        self.device = device
        self.dtype = dtype
        self.schedule = self.read_schedule(model)
        self.forwards = 0
        self.encodes = False
        self._empty: Conditioning | None = None

    @classmethod
    @abstractmethod
    def load(
        cls,
        model: ModelConfig,
        *,
        text: bool,
        image: bool,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The denoiser; the text encoders only if ``text``, the VAE only if ``image``.

        Raises:
            ModelError: a part is missing, gated or of another architecture, in one line.
        """

    @classmethod
    @abstractmethod
    def skeleton(cls, model: ModelConfig) -> nn.Module:
        """The denoiser without weights, on the meta device, from its config alone."""

    @classmethod
    def shape(cls, model: ModelConfig) -> Shape | None:
        """From configs alone; None where a family does not say, so that nothing can be estimated."""
        return None

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts for the denoiser: each tensor [B, ...] float32, by its argument's name."""

    def empty(self) -> Conditioning:
        """Embeddings of the empty prompt, each [1, ...], encoded once."""
        if self._empty is None:
            self._empty = self.encode([""])
        return self._empty

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """One forward of ``self.denoiser``.

        Args:
            x: [B, C, H, W] float32.
            t: [B] float32; ``clock`` makes the network's timestep of it.
            cond: each tensor [B, ...].

        Returns:
            velocity eps - x0, [B, C, H, W].
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] to images [B, 3, height, width] in [0, 1], float32."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] in [0, 1] to the latents that ``decode`` takes, [B, C, H, W] float32.

        The same images always give the same latents, and no gradient is kept.

        Raises:
            ModelError: loaded without its VAE.
            ValueError: images of another size than ``decode`` gives.
        """

    @abstractmethod
    def random_conditioning(self, generator: torch.Generator) -> Conditioning:
        """A conditioning of the right widths, each tensor [1, ...], without a text encoder.

        Weights are proven with it: sender and receiver compare their velocities on it.
        """

    @classmethod
    @abstractmethod
    def fingerprint(cls, model: ModelConfig) -> dict[str, object]:
        """What has to agree wherever one trajectory is read: latent space, prediction, schedule. From configs alone."""

    @classmethod
    def read_schedule(cls, model: ModelConfig) -> Schedule:
        """The model's own, from scheduler_config.json alone; a flow model's unless overridden.

        Raises:
            ModelError: the file is missing, or names a schedule that the family does not know.
        """
        return read_flow_schedule(model)

    def autocast(self) -> torch.autocast:
        """Matrix products in ``dtype``. Casts are kept no longer than one forward: adapters change in between."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def save_memory(self) -> None:
        """Recompute activations in the backward pass instead of keeping them (gradient checkpointing)."""
        self.network.enable_gradient_checkpointing()

    def add_student(self, name: str, lora: LoraConfig | None, seed: int) -> None:
        """What a run trains, under a name: a fresh LoRA, or the network's own weights where there is none."""
        if lora is None:
            self.add_own(name)
        else:
            self.add_lora(name, lora, seed)

    def save_own(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the denoiser as diffusers' ``from_pretrained`` reads it, in float32.

        Args:
            folder: gets config.json and safetensors files.
            weights: all of its parameters, by name.

        Raises:
            ValueError: ``weights`` are not this network's, by name or shape.
        """
        whole: Any = self.skeleton(self.model)
        expected = {name: parameter.shape for name, parameter in whole.named_parameters()}
        wrong = expected.keys() ^ weights.keys() or {n for n, shape in expected.items() if shape != weights[n].shape}
        if wrong:
            raise ValueError(f"weights of the denoiser differ in name or shape: {min(wrong)}")
        have = {**dict(self.network.named_buffers()), **weights}
        whole.load_state_dict({name: have[name] for name in whole.state_dict()}, assign=True)
        whole.save_pretrained(folder)

    @torch.no_grad()
    def load_own(self, folder: Path) -> None:
        """Take the denoiser's weights from what ``save_own`` wrote, in whatever format they are computed in.

        Raises:
            ModelError: files are missing or not whole, or are not this network's, by name or shape.
        """
        what = f"the denoiser in {folder}"
        with refusing(what):
            found = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
        own = dict(self.network.named_parameters())
        wrong = own.keys() - found.keys() or {name for name in own if own[name].shape != found[name].shape}
        if wrong:
            raise ModelError(
                f"{what} does not fit model {self.model.path!r}: {min(wrong)} is missing or of another shape"
            )
        for name, parameter in own.items():
            parameter.copy_(found[name])

    def sigmas(self, num_steps: int) -> Tensor:
        """[num_steps + 1] float32 on the CPU, falling from at most 1 (noise) down to 0 (image) or close to it."""
        return self.schedule.sigmas(num_steps)

    def clock(self, t: Tensor) -> Tensor:
        """The timestep that the denoiser takes, float32, for t in [0, 1]; 1000 t of a flow model."""
        return self.schedule.clock(t)

    def initial(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The first state of a path, [B, C, H, W], from standard normal noise; the same where sigmas begin at 1."""
        return self.schedule.initial(noise, sigmas)

    def final(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """What ``decode`` takes, from the last state of a path; the same where sigmas end at 0."""
        return self.schedule.final(x, sigmas)

    def velocity(
        self,
        x: Tensor,
        t: float | Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        guidance: float,
    ) -> Tensor:
        """The guided velocity, with gradients wherever a parameter is trainable.

        Args:
            x: [B, C, H, W] float32.
            t: in [0, 1]: one number, 0-d, or [B].
            cond: each tensor [B, ...].
            uncond: of the empty prompt, each tensor [1, ...]; unused at guidance 1.
            guidance: 1 runs the conditional rows alone; else one forward of 2 B rows.

        Returns:
            [B, C, H, W] float32.

        Raises:
            ValueError: guidance without ``uncond``, or rows that do not belong together.
        """
        rows = len(x)
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(rows)
        wrong = [name for name, tensor in cond.items() if len(tensor) != rows]
        if wrong:
            raise ValueError(f"{rows} latents and {len(cond[wrong[0]])} rows of {wrong[0]}")
        if guidance == 1:
            self.forwards += rows
            with self.autocast():
                return self.predict(x, times, cond).float()
        if uncond.keys() != cond.keys():
            raise ValueError(
                f"guidance {guidance} needs the empty prompt's {', '.join(sorted(cond))}, got "
                f"{', '.join(sorted(uncond)) or 'nothing'}"
            )
        both = {
            name: torch.cat([uncond[name].expand(rows, *tensor.shape[1:]), tensor]) for name, tensor in cond.items()
        }
        self.forwards += 2 * rows
        with self.autocast():
            answer = self.predict(torch.cat([x, x]), times.repeat(2), both)
        without, given = answer.float().chunk(2)
        return guide(without, given, guidance)


def count_numbers(module: nn.Module) -> int:
    """Of its parameters and buffers, position embeddings among them."""
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def family_class(name: str) -> type[Family]:
    """The family that a configuration names.

    Raises:
        ConfigError: unknown, not importable, or not a Family.
    """
    found: Any = plugins.load(name, FAMILIES, "family")
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise ConfigError(f"family {name!r} is {found!r}, not a subclass of opd_ray.models.Family")
    return found


def load_family(
    model: ModelConfig, *, text: bool, image: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Family:
    """``family_class(model.family).load(...)``."""
    family = family_class(model.family).load(model, text=text, image=image, device=device, dtype=dtype)
    family.encodes = text
    return family


def trained_folder(model: ModelConfig, student: StudentConfig) -> str:
    """The folder of the run that gets what was trained: `lora`, or the denoiser's own in a checkpoint."""
    return family_class(model.family).denoiser_part if student.lora is None else "lora"


def read_shift(model: ModelConfig) -> float:
    """The shift of a flow model's sigma schedule, without loading any weights."""
    return read_flow_schedule(model).shift


def check_adapters(model: ModelConfig, student: LoraConfig | None, teachers: Mapping[str, TeacherConfig]) -> None:
    """Whether the student's targets exist and every teacher's LoRA fits, before anything is loaded.

    Raises:
        ModelError: names the adapter and what does not fit.
    """
    kind = family_class(model.family)
    network = kind.skeleton(model)
    for name, teacher in teachers.items():
        if teacher.lora is None:
            continue
        file = read_lora(
            name,
            teacher.lora,
            part=kind.denoiser_part,
            revision=teacher.revision,
            subfolder=teacher.subfolder,
            alpha=teacher.alpha,
        )
        check_fits(file, network)
    if student is not None:
        Adapters(network, part=kind.denoiser_part, targets=kind.lora_targets).add_lora("student", student, 0)


def check_lora(model: ModelConfig, path: str) -> None:
    """Whether a LoRA fits a model, before anything is loaded.

    Raises:
        ModelError: what does not fit.
    """
    kind = family_class(model.family)
    check_fits(read_lora("lora", path, part=kind.denoiser_part), kind.skeleton(model))


def sigmas_of(model: ModelConfig, num_steps: int) -> Tensor:
    """What ``Family.sigmas`` of the loaded model would be, without loading any weights."""
    return family_class(model.family).read_schedule(model).sigmas(num_steps)
