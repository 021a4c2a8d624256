"""The rollout actor: encodes prompts, draws along the behaviour policy's own denoising path, decodes pictures."""

import itertools
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from opd_ray.config import LoraConfig, ModelConfig
from opd_ray.diffusion import KERNELS, sample
from opd_ray.digest import checksum
from opd_ray.errors import ModelError, NotFiniteError, StaleWeightsError
from opd_ray.models.base import Family, load_family
from opd_ray.seeds import fold, generator, noise
from opd_ray.types import Conditioning, Prompt, Trajectory, WeightVersion, WorkItem

__all__ = ["Ack", "Policy", "RolloutActor", "SampleRequest", "probe_velocity"]


@dataclass(frozen=True, slots=True)
class Ack:
    """What a receiver read back from its own bound parameters after taking weights."""

    version: WeightVersion
    tensors: int
    sha256: str
    """Of the weights, as the publisher took it; whoever draws names it."""
    checksum: str | None = None
    """Of the receiver's own parameters, equal to the publisher's."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How this run's student draws."""

    lora: LoraConfig | None
    """None binds the network's own weights."""
    adapter: str
    guidance: float
    kernel: str
    noise_level: float
    seed: int
    probe_tolerance: float
    """How far its velocity at the probe may be from the learner's, relative to the largest: formats may differ."""
    negatives: bool
    """Whether embeddings of the empty prompt travel along: some participant's guidance is not 1."""
    velocities: bool = False
    """Whether its own velocities travel along."""
    shared_noise: int = 1
    """So many neighbouring images of a prompt begin with the same noise."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Pictures to look at and to score: a fixed forward batch with seeds of its own."""

    model: Literal["base", "student"] | str
    """`base`, `student`, or the name of a teacher."""
    lora: tuple[str, str | None, str | None, float | None] | None
    """Path, revision, subfolder and given alpha of the teacher's LoRA."""
    guidance: float
    steps: int
    seed: int
    prompts: tuple[Prompt, ...]
    samples: tuple[int, ...]
    weights: tuple[WeightVersion, str] | None = None
    """Version and sha256 of the student's."""
    checkpoint: ModelConfig | None = None
    """Of a teacher that is no LoRA."""


def probe_velocity(family: Family, guidance: float, seed: int) -> Tensor:
    """The active adapter's velocity [1, C, H, W] at a fixed small input; receiver and sender must agree on it.

    The conditioning is random too, since learners hold no text encoder.
    """
    x = noise([fold(seed, "eval", "probe")], family.latent_shape).to(family.device)
    cond, uncond = (
        {key: tensor.to(family.device) for key, tensor in family.random_conditioning(rng).items()}
        for rng in (generator(seed, "eval", name) for name in ("cond", "uncond"))
    )
    with torch.no_grad():
        velocity = family.velocity(x, 0.5, cond, uncond, guidance)
    return velocity


@torch.no_grad()
def draw_pictures(family: Family, request: SampleRequest, after_step: Callable[[], None] = lambda: None) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] by the ODE with the adapter in use; first noises depend on prompts and seed."""
    cond = family.encode([prompt.text for prompt in request.prompts])
    uncond = family.empty() if request.guidance != 1 else {}
    rows = zip(request.prompts, request.samples, strict=True)
    x = noise([fold(request.seed, "eval", prompt.id, n) for prompt, n in rows], family.latent_shape).to(family.device)
    sigmas = family.sigmas(request.steps)
    x = family.initial(x, sigmas)
    for t, t_next in itertools.pairwise(sigmas.tolist()):
        x = x + (t_next - t) * family.velocity(x, t, cond, uncond, request.guidance)
        after_step()
    return family.decode(family.final(x, sigmas))


class RolloutActor:
    """Draws what the learner trains on, and the pictures that people and rewards look at."""

    def __init__(
        self,
        family: Family,
        policy: Policy,
        sigmas: Tensor,
        pictured: Callable[[Trajectory], Tensor | None] = lambda trajectory: None,
        remarks: Callable[[Trajectory], Mapping[str, "array[float]"]] = lambda trajectory: {},
    ) -> None:
        self.family = family
        self.policy = policy
        self.sigmas = sigmas
        self._pictured = pictured
        self.remarks = remarks
        own = family.sigmas(len(sigmas) - 1)
        if not torch.equal(own, sigmas):
            raise ModelError(f"the model's sigma schedule {own.tolist()} is not the run's {sigmas.tolist()}")
        family.add_student(policy.adapter, policy.lora, fold(policy.seed, "lora"))
        family.use(policy.adapter)
        self.bound: Ack | None = None
        self._other: Family | None = None

    def bind(
        self, write: Callable[[Mapping[str, Tensor]], None], version: WeightVersion, sha256: str, sent: str | None
    ) -> Ack:
        """Let weights be copied into the behaviour adapter, and prove it by reading all of its parameters back.

        Args:
            write: copies into these parameters; ValueError where they are not what was sent.
            version: of the weights.
            sha256: their identity.
            sent: their checksum, by the publisher.

        Raises:
            StaleWeightsError: names, shapes, number formats or content differ from what was sent.
        """
        self.bound = None
        parameters = self.family.adapter_parameters(self.policy.adapter)
        try:
            write(parameters)
        except ValueError as error:
            raise StaleWeightsError(f"weights {version} do not fit: {error}") from error
        ack = Ack(version, len(parameters), sha256, checksum(parameters))
        if ack.checksum != sent:
            raise StaleWeightsError(f"weights {version} read back as {ack.checksum}, sent as {sent}")
        self.bound = ack
        return ack

    def probe(self) -> Tensor:
        """The bound policy's velocity at the fixed probe input."""
        self.family.use(self.policy.adapter)  # another role of this process may share the family
        return probe_velocity(self.family, self.policy.guidance, self.policy.seed)

    def draw(
        self,
        item: WorkItem,
        version: WeightVersion,
        sha256: str,
        *,
        last: int | None = None,
        before: Trajectory | None = None,
    ) -> Trajectory:
        """The behaviour policy's own path for one work item, or a part of it; no gradient.

        Args:
            item: what to draw.
            version: of the weights to draw with.
            sha256: of these weights.
            last: the state to end with; None is the image.
            before: the part before it, with the conditioning; None begins with the noise. Any worker may have drawn it.

        Returns:
            States up to ``last``: from the noise on, with the conditioning; or those after ``before``, without it.

        Raises:
            StaleWeightsError: these weights were not bound and proven here, or did not draw ``before``.
        """
        self._require_bound(str(item), (version, sha256))
        if before is not None and before.weights != version:
            raise StaleWeightsError(
                f"{item} asks for weights {version}, its part before was drawn with {before.weights}"
            )
        self.family.use(self.policy.adapter)
        rows = [(prompt.id, sample) for prompt, sample in zip(item.prompts, item.samples, strict=True)]
        seed, kernel = self.policy.seed, KERNELS[self.policy.kernel]
        begun = self._begin(item, version, rows) if before is None else before.to(self.family.device)
        x, states, velocities = begun.state(begun.last).contiguous(), list[Tensor](), list[Tensor]()
        for j in range(begun.last, len(self.sigmas) - 1 if last is None else last):
            t, t_next = float(self.sigmas[j]), float(self.sigmas[j + 1])
            velocity = self._velocity(x, t, begun.cond, begun.uncond, self.policy.guidance)
            step = kernel(x, velocity, t, t_next, self.policy.noise_level)
            x = step.mean
            if self.policy.noise_level > 0:
                seeds = [fold(seed, "step_noise", item.round, *row, j) for row in rows]
                x = sample(step, self._noise(seeds))
            states.append(x)
            velocities.append(velocity)
        if not x.isfinite().all():  # what is not finite stays so, and what reads it need not be blamed
            raise NotFiniteError(
                f"the student of weights {version} drew NaN or infinity in {item}, first prompt "
                f"{item.prompts[0].text!r}; lower optimizer.lr or use another precision, then go on with --resume"
            )
        kept = torch.stack(velocities, dim=1) if self.policy.velocities and velocities else None
        if before is None:
            return replace(begun, latents=torch.stack([begun.state(0), *states], dim=1), velocities=kept)
        return Trajectory(item, version, self.sigmas, torch.stack(states, dim=1), {}, {}, before.last + 1, kept)

    def _begin(self, item: WorkItem, version: WeightVersion, rows: Sequence[tuple[str, int]]) -> Trajectory:
        """The noise and the conditioning. Laid out as a copy that travelled would be, so that parts change no bit."""
        cond = self.family.encode([prompt.text for prompt in item.prompts])
        uncond = self.family.empty() if self.policy.negatives else {}
        begins = [(name, sample // self.policy.shared_noise) for name, sample in rows]
        x = self._noise([fold(self.policy.seed, "init_noise", item.round, *names) for names in begins])
        x = self.family.initial(x, self.sigmas)
        cond, uncond = ({name: one.contiguous() for name, one in side.items()} for side in (cond, uncond))
        return Trajectory(item, version, self.sigmas, x.unsqueeze(1), cond, uncond)

    def _require_bound(self, what: str, asked: tuple[WeightVersion, str] | None) -> None:
        if self.bound is None or (self.bound.version, self.bound.sha256) != asked:
            raise StaleWeightsError(f"{what} asks for weights {asked and asked[0]}, bound is {self.bound}")

    def decode(self, trajectory: Trajectory) -> Tensor:
        """The pictures that are scored, [B K, 3, H, W] in [0, 1], the K of an image after one another.

        That of its last state alone, unless the algorithm asks for others.
        """
        latents = self._pictured(trajectory)
        if latents is not None:
            return self.family.decode(latents.flatten(0, 1))
        return self.family.decode(self.family.final(trajectory.state(len(self.sigmas) - 1), self.sigmas))

    def sample(self, request: SampleRequest) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] of any model of the run, at seeds that all models share.

        Raises:
            StaleWeightsError: the student's, and these weights were not bound and proven here.
        """
        if request.model == "student":
            self._require_bound("a picture of the student", request.weights)
        model = request.checkpoint
        if model is None and self.policy.lora is None and request.model != "student":
            model = self.family.model  # a student that is the network itself has taken the base's place
        if model is not None:
            return self._of_another(request, model)
        self._other = None  # as large as the student's own model
        with self.family.adapter(self._adapter_of(request, self.family)):
            return draw_pictures(self.family, request)

    def _of_another(self, request: SampleRequest, model: ModelConfig) -> Tensor:
        """Pictures of another whole model. One at a time is held, since it may be as large as the student's."""
        own = self.family
        if self._other is None or self._other.model != model:
            self._other = None
            self._other = load_family(model, text=True, image=True, device=own.device, dtype=own.dtype)
        before = self._other.forwards
        with self._other.adapter(self._adapter_of(request, self._other)):
            pictures = draw_pictures(self._other, request)
        own.forwards += self._other.forwards - before
        return pictures

    def _adapter_of(self, request: SampleRequest, family: Family) -> str | None:
        if request.model == "base" or request.checkpoint is not None:
            return None
        if request.model == "student":
            return self.policy.adapter
        name = f"teacher:{request.model}"  # no teacher can be called so
        if request.lora is not None and name not in family.adapters:
            path, revision, subfolder, alpha = request.lora
            family.load_lora(name, path, revision=revision, subfolder=subfolder, alpha=alpha)
        return name

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        """Drawn on the CPU, so that it is the same on every device."""
        return noise(seeds, self.family.latent_shape).to(self.family.device)

    @torch.no_grad()
    def _velocity(self, x: Tensor, t: float, cond: Conditioning, uncond: Conditioning, guidance: float) -> Tensor:
        return self.family.velocity(x, t, cond, uncond, guidance)


def rows_of(prompts: Sequence[Prompt], images_per_prompt: int) -> tuple[tuple[Prompt, ...], tuple[int, ...]]:
    """Prompts repeated once an image, and which image of its prompt each row is."""
    rows = tuple(prompt for prompt in prompts for _ in range(images_per_prompt))
    return rows, tuple(range(images_per_prompt)) * len(prompts)
