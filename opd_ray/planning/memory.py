"""Memory of each role, estimated from configs alone: no weight is loaded for it.

Weights are exact. Activations follow the usual counts for a transformer block over ``rows`` pictures of ``tokens``
tokens in ``width`` channels at ``b`` bytes a number, with attention that keeps no score matrix:

    one block at work              17 rows tokens width b     (34 bytes at b = 2: arXiv 2205.05198, Eq. 1)
    kept for the backward pass     17 rows tokens width b     a block
    with gradient checkpointing       rows tokens width b     a block, and one block at work

What the learner trains is float32: the weight, its gradient, two moments, and a moving average where there is one.
``ddp`` reduces another copy of the gradient, DeepSpeed steps one of the weight; ``fsdp2`` and ZeRO spread over the
ranks what is theirs to spread. Weights that are spread are whole for two blocks at a time, the one at work and the
next, which comes meanwhile; so are the gradients of two, one being made and one reduced, for which DeepSpeed has a
buffer. What a network holds beside its weights (position embeddings) is not spread.

Each extra adapter that the algorithm declares, as `old` of DiffusionNFT, is one more float32 weight, held as those of
the network are. The frozen start (`reference`) is the network with its adapter off, and no copy, but after
`student.lora.start`.

A guided forward has two rows a picture. The VAE decodes in float32 at 512 channels of full resolution. Each process
that computes on a card holds about 0.6 GB of its runtime. Real numbers differ by tens of percent.

CPU memory beside a card is not counted: each rank whose weights are spread reads all of them there at its start, and
the first gathers there what a checkpoint holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opd_ray.algorithms import Algorithm, make_algorithm
from opd_ray.config import Config, LearnerPlacement, LoraConfig, ModelConfig, Placement, Precision, RolePlacement
from opd_ray.errors import PlacementError
from opd_ray.learners.deepspeed import REDUCED
from opd_ray.models.base import Shape, family_class, resolve
from opd_ray.models.precision import is_full
from opd_ray.models.residents import check_fits_limit
from opd_ray.models.teachers import Checkpoint, check_checkpoint, same_text, teacher_model

__all__ = ["Need", "check_memory", "check_teacher_memory", "needs"]

GB = 1e9
RUNTIME_GB = 0.6
BLOCK = 17.0
VAE_CHANNELS = 512
MOMENTS = 2
"""Of AdamW, for each trained number."""
AT_ONCE = 2
"""Blocks whose weights are whole at a time where they are spread."""


@dataclass(frozen=True, slots=True)
class Need:
    """One worker of a role, in GB (1e9 bytes)."""

    role: str
    workers: int
    device: str
    gpu: float
    """Cards, or the part of one, that each worker asks for."""
    weights: float
    trained: float
    """Adapters, gradients, optimizer, moving average."""
    working: float
    own: float = 0.0
    """The part of the weights that no other role can share: teachers that are full checkpoints."""

    @property
    def total(self) -> float:
        """Of one worker."""
        return self.weights + self.trained + self.working + (RUNTIME_GB if self.device == "cuda" else 0.0)


def needs(config: Config) -> list[Need]:
    """Every role that holds the model; none where the family cannot say.

    Raises:
        UserError: the model's configs cannot be read.
    """
    shape = family_class(config.model.family).shape(config.model)
    if shape is None:
        return []
    algorithm = make_algorithm(config)
    found = [_reader(config, shape)] if config.pairs is not None else []
    found += [_rollout(config, shape)] if algorithm.needs_rollouts or config.evaluated else []
    found += _teachers(config, shape) if algorithm.needs_teachers else []
    found.append(_learner(config, shape, algorithm))
    return [_together(config, found)] if config.cluster.runtime == "local" else found


def check_memory(config: Config, found: Sequence[Need]) -> None:
    """Refuse by name what does not fit on its part of a card, where the cluster file says how large a card is.

    Args:
        config: the run.
        found: what ``needs`` gave for it.

    Raises:
        PlacementError: the role, what it needs, what it has, and what lowers it.
    """
    card = config.cluster.gpu_memory_gb
    if card is None:
        return
    for need in found:
        share = card * min(need.gpu, 1.0)
        if need.device == "cuda" and need.total > share:
            raise PlacementError(
                f"role {need.role} needs about {need.total:.1f} GB ({need.weights:.1f} weights, {need.trained:.1f} "
                f"trained, {need.working:.1f} at work) and has {share:.1f} GB of a card of {card:g} GB; lower "
                "batch.item_size, set student.gradient_checkpointing, use bf16, or give it more of a card"
                + (", or spread the learner: cluster.learner.backend fsdp2" if _whole(config, need) else "")
            )


def _whole(config: Config, need: Need) -> bool:
    return need.role == "learner" and config.cluster.learner.backend == "ddp"


def check_teacher_memory(config: Config) -> None:
    """Refuse teachers that can never fit into ``cluster.teacher_memory_gb``, by the headers of what lies here.

    What is on a hub is measured by the worker that downloads it, and so are the LoRAs.

    Raises:
        PlacementError: the teacher, the sum and the limit.
    """
    cluster = config.cluster
    if cluster.teacher_memory_gb is None:
        return

    def nbytes(name: str) -> int:
        teacher = config.teachers[name]
        model, device = teacher_model(config.model, teacher), cluster.of_teacher(name).device
        dtype = torch.float32 if is_full(teacher.precision or config.precision.teacher, device) else torch.float16
        if not Path(resolve(model.path), model.subfolder or "").is_dir():
            return 0
        text = teacher.model is not None and not same_text(config.model, model)
        return Checkpoint(model, device, dtype, text).nbytes()

    loras = [name for name, teacher in config.teachers.items() if teacher.lora is not None]
    base = max(map(nbytes, loras), default=0)
    sizes = {name: nbytes(name) for name in config.teachers if name not in loras}
    check_fits_limit(cluster.teacher_memory_gb * GB, base if cluster.share_teachers else 0, sizes)
    check_fits_limit(cluster.teacher_memory_gb * GB, base, {})


def _bytes(precision: Precision, device: str) -> int:
    return 4 if is_full(precision, device) else 2


def _block(shape: Shape, rows: int, size: int) -> float:
    """GB of one block at work."""
    return BLOCK * rows * shape.tokens * shape.width * size / GB


def _rows(guidance: float, pictures: int) -> int:
    return pictures * (1 if guidance == 1 else 2)


def _adapter(config: Config, shape: Shape) -> float:
    """GB of a float32 adapter: each target is taken for a square layer of the block's width."""
    lora = config.student.lora or LoraConfig()  # a teacher's, where the student has none
    targets = family_class(config.model.family).lora_targets if lora.targets is None else lora.targets
    return 2 * lora.rank * shape.width * len(targets) * shape.layers * 4 / GB


def _student(config: Config, shape: Shape, size: int) -> tuple[float, float]:
    """GB of the frozen denoiser at ``size`` bytes a number, and of one float32 copy of what is trained."""
    numbers, buffers = shape.parameters["denoiser"] / GB, shape.buffers / GB
    if config.student.lora is None:
        return buffers * size, (numbers - buffers) * 4
    return numbers * size, _adapter(config, shape)


def _reader(config: Config, shape: Shape) -> Need:
    """A whole model, of which pairs pass through the text encoders and the VAE."""
    placement, parts = config.cluster.rollout, shape.parameters
    size = _bytes(config.precision.rollout, placement.device)
    weights = ((parts["denoiser"] + parts["text"]) * size + parts["vae"] * 4) / GB
    pictures = 2 * config.batch.item_size
    return _need("reader", placement, weights, 0.0, pictures * shape.pixels**2 * VAE_CHANNELS * 4 / GB)


def _rollout(config: Config, shape: Shape) -> Need:
    placement, parts = config.cluster.rollout, shape.parameters
    size = _bytes(config.precision.rollout, placement.device)
    pictures = max(config.batch.item_size, config.evaluation.batch if config.evaluated else 0)
    whole = ((parts["denoiser"] + parts["text"]) * size + parts["vae"] * 4) / GB
    frozen, trained = _student(config, shape, size)
    base = frozen + (parts["text"] * size + parts["vae"] * 4) / GB
    # A teacher that is a full checkpoint is drawn with at the end, one such at a time; so is the base, where it is not
    # under the student.
    others = config.student.lora is None or any(teacher.model for teacher in config.teachers.values())
    evaluated = config.evaluated and others
    decoding = pictures * shape.pixels**2 * VAE_CHANNELS * 4 / GB if config.evaluated else 0.0
    working = max(_block(shape, _rows(config.student.guidance, pictures), size), decoding)
    return _need("rollout", placement, base, trained, working, own=whole if evaluated else 0.0)


def _teachers(config: Config, shape: Shape) -> list[Need]:
    of, parts = config.cluster.of_teacher, shape.parameters

    def need(role: str, names: list[str], placement: RolePlacement) -> Need:
        bases, shared, own, working = set[tuple[ModelConfig, int]](), 0.0, 0.0, 0.0
        for name in names:
            teacher = config.teachers[name]
            size = _bytes(teacher.precision or config.precision.teacher, placement.device)
            base, its = teacher_model(config.model, teacher), shape
            if teacher.model is not None:
                check_checkpoint(name, config.model, base)
                its = family_class(base.family).shape(base) or shape
            if (base, size) not in bases:
                bases.add((base, size))
                if teacher.model is None:
                    shared += parts["denoiser"] * size / GB
                else:  # whether its text encoders are the student's shows when they are compared
                    own += (its.parameters["denoiser"] + its.parameters["text"]) * size / GB
            working = max(working, _block(its, _rows(teacher.guidance, config.batch.item_size), size))
        adapters = sum(config.teachers[name].lora is not None for name in names) * _adapter(config, shape)
        if config.cluster.teacher_memory_gb is not None:  # checkpoints beyond it are let go
            own = min(own, max(config.cluster.teacher_memory_gb - shared - adapters, 0.0))
        return _need(role, placement, shared, adapters, working, own=own)

    if config.cluster.share_teachers:
        return [need("teachers", list(config.teachers), of())]
    return [need(f"teacher.{name}", [name], of(name)) for name in config.teachers]


def _learner(config: Config, shape: Shape, algorithm: Algorithm) -> Need:
    placement, extra = config.cluster.learner, len(algorithm.beside(config.student.lora))
    size = _bytes(config.precision.learner, placement.device)
    rows = _rows(config.student.guidance, config.batch.item_size)
    block = _block(shape, rows, size)
    kept = block / BLOCK if config.student.gradient_checkpointing else block
    held = 4 if config.student.lora is None else size
    frozen, one = _student(config, shape, held)
    buffers = shape.buffers * held / GB
    part, copies = _shares(placement, ema=config.ema is not None)
    # Those that are trained by losses of their own have gradients and moments too, but no moving average.
    own = len(algorithm.trained) * (_shares(placement, ema=False)[1] - part)
    weights, trained = (frozen - buffers) * part + buffers, one * (copies + extra * part + own)
    working = shape.layers * kept + block + _gathered(placement, shape, frozen - buffers + one * extra, one)
    if placement.device == "cpu" and placement.spreads_weights:  # where all of them are at first
        working = max(working, frozen + one * (1 + extra) - weights - trained)
    return _need("learner", placement, weights, trained, working, workers=placement.ranks)


def _gathered(placement: LearnerPlacement, shape: Shape, frozen: float, trained: float) -> float:
    """GB of what is whole for a while on a rank that holds a part of it: weights, and the gradients to be reduced.

    Args:
        placement: the learner's.
        shape: the model's.
        frozen: GB of weights that are not trained.
        trained: GB of one copy of those that are.
    """
    blocks = AT_ONCE / shape.layers * (1 - 1 / placement.ranks) if placement.spreads_weights else 0.0
    reduced = min(trained, 4 * REDUCED / GB) if placement.backend == "deepspeed" else trained * blocks
    return (frozen + trained) * blocks + reduced


def _shares(placement: LearnerPlacement, *, ema: bool) -> tuple[float, float]:
    """Of one rank: the part of the weights that it holds, and how many copies of what is trained, on its card."""
    part = 1 / placement.ranks
    if placement.backend == "ddp":
        return 1.0, 2 + MOMENTS + ema + (placement.ranks > 1)
    if placement.backend == "fsdp2":
        return part, (2 + MOMENTS + ema) * part
    stage = placement.stage
    held = part if stage == 3 else 1.0
    stepped = 0.0 if placement.cpu_offload else (1 + MOMENTS) * part  # a copy of the weight, and the moments
    gradient = 1.0 if stage == 1 else 0.0 if placement.cpu_offload else part
    return held, held * (1 + ema) + gradient + stepped


def _need(
    role: str,
    placement: Placement,
    shared: float,
    trained: float,
    working: float,
    *,
    own: float = 0.0,
    workers: int | None = None,
) -> Need:
    count = workers if workers is not None else getattr(placement, "workers", 1)
    gpu = placement.resources.get("gpu", 0.0)
    return Need(role, count, placement.device, gpu, shared + own, trained, working, own)


def _together(config: Config, found: list[Need]) -> Need:
    """All roles in one process, one of them at work at a time; over one base where they share it."""
    rollout, own = found[0], sum(need.own for need in found)
    each = sum(need.workers * (need.weights - need.own) for need in found)
    return Need(
        role="all roles together",
        workers=1,
        device="cuda" if any(need.device == "cuda" for need in found) else "cpu",
        gpu=max(need.gpu for need in found),
        weights=own + (rollout.weights - rollout.own if config.cluster.share_base else each),
        trained=sum(need.workers * need.trained for need in found),
        working=max(need.working for need in found),
        own=own,
    )
