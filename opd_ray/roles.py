"""What one worker of each role is made of: plain classes over a model, from the configuration alone.

The functions named after a role give what a worker process calls to make its host; ``make_*`` give the plain class, to
run in a debugger.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from opd_ray.actors import Policy, RewardActor, RolloutActor, TeacherActor
from opd_ray.actors.pairs import PairsActor
from opd_ray.actors.recorded import RecordedActor
from opd_ray.algorithms import Algorithm, make_algorithm
from opd_ray.config import Config, ModelConfig, PairsConfig, TeacherConfig
from opd_ray.learners import Learner, make_engine
from opd_ray.learners.learner import Training
from opd_ray.models.base import Family, load_family, sigmas_of
from opd_ray.models.precision import dtype_of, is_full
from opd_ray.models.teachers import Checkpoint, same_text, teacher_model
from opd_ray.pairs.index import PairIndex
from opd_ray.pairs.order import Order
from opd_ray.pairs.windows import Reading, Rows
from opd_ray.planning.rates import reward_role
from opd_ray.rewards.base import make_rewards
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.hosts import LearnerHost, RecordedHost, RolloutHost, TeacherHost
from opd_ray.runtime.pool import Pool
from opd_ray.runtime.readers import PairsHost
from opd_ray.runtime.rewards import RewardHost
from opd_ray.scoring import Judges, Panel
from opd_ray.types import Prompt

__all__ = [
    "Bases",
    "judges",
    "learner",
    "make_learner",
    "make_pairs",
    "make_reward",
    "make_rollout",
    "make_teacher",
    "reader",
    "reward",
    "rollout",
    "teacher",
]

Made = Callable[[], Any]
"""Makes a worker's host, in its process."""


class Bases:
    """The frozen models of one process: each role's own, or one for all of them."""

    def __init__(self, *, share: bool = False) -> None:
        self._share = share
        self._shared: Family | None = None

    def load(
        self, model: ModelConfig, device: str, dtype: torch.dtype, *, text: bool = False, image: bool = False
    ) -> Family:
        """The student's base for a role; a shared one has all parts, since the first to ask may need the least."""
        if not self._share:
            return load_family(model, text=text, image=image, device=device, dtype=dtype)
        if self._shared is None:
            self._shared = load_family(model, text=True, image=True, device=device, dtype=dtype)
        return self._shared


def rollout(config: Config, algorithm: Algorithm, bases: Bases) -> Made:
    """Draws what is trained on, and pictures."""
    guidances = [config.student.guidance, *(teacher.guidance for teacher in config.teachers.values())]
    policy = Policy(
        lora=config.student.lora,
        adapter="behaviour" if config.cluster.share_base else "student",  # the learner's is in the same network then
        guidance=config.student.guidance,
        kernel=algorithm.kernel,
        noise_level=algorithm.noise_level,
        seed=config.seed,
        probe_tolerance=_probe_tolerance(config),
        negatives=any(guidance != 1 for guidance in guidances),
        velocities=algorithm.needs_velocities,
        shared_noise=config.batch.images_per_prompt if algorithm.shared_noise else 1,
    )
    sigmas = tuple(sigmas_of(config.model, config.sampling.steps).tolist())
    return partial(RolloutHost, partial(make_rollout, config, policy, sigmas, bases))


def _probe_tolerance(config: Config) -> float:
    """Other thread counts differ by about 1e-6, half precision by a percent or two, another adapter by far more."""
    roles = (
        (config.precision.rollout, config.cluster.rollout.device),
        (config.precision.learner, config.cluster.learner.device),
    )
    return 1e-3 if all(is_full(precision, device) for precision, device in roles) else 5e-2


def make_rollout(config: Config, policy: Policy, sigmas: tuple[float, ...], bases: Bases | None = None) -> RolloutActor:
    """Text encoders, denoiser and VAE."""
    device = config.cluster.rollout.device
    dtype = dtype_of(config.precision.rollout, device)
    family = (bases or Bases()).load(config.model, device, dtype, text=True, image=True)
    algorithm = make_algorithm(config)
    return RolloutActor(family, policy, torch.tensor(sigmas), algorithm.pictured, algorithm.remarks)


def teacher(config: Config, names: tuple[str, ...], bases: Bases) -> Made:
    """Marks with these teachers."""
    return partial(TeacherHost, partial(make_teacher, config, names, bases))


def make_teacher(config: Config, names: tuple[str, ...], bases: Bases | None = None) -> TeacherActor:
    """Denoisers alone, one for all teachers that may share it; text encoders where a teacher's are its own."""
    cluster, teachers = config.cluster, {name: config.teachers[name] for name in names}
    device = cluster.of_teacher(names[0]).device
    loaded: dict[torch.dtype, Family] = {}

    def dtype(teacher: TeacherConfig) -> torch.dtype:
        return dtype_of(teacher.precision or config.precision.teacher, device)

    def base(teacher: TeacherConfig) -> Family:
        form = dtype(teacher)
        if form not in loaded:
            loaded[form] = (bases or Bases()).load(config.model, device, form)
        return loaded[form]

    def checkpoint(teacher: TeacherConfig) -> Checkpoint:
        model = teacher_model(config.model, teacher)
        return Checkpoint(model, device, dtype(teacher), text=not same_text(config.model, model))

    return TeacherActor(
        base,
        teachers,
        checkpoints={name: checkpoint(teacher) for name, teacher in teachers.items() if teacher.model is not None},
        limit=cluster.teacher_memory_gb and cluster.teacher_memory_gb * 1e9,
        asked=make_algorithm(config).asked,
    )


def reader(config: Config, index: PairIndex | None, bases: Bases) -> Made | None:
    """Reads recorded experience, or pairs; None where the student draws."""
    if config.recorded is not None:
        return partial(RecordedHost, partial(RecordedActor, config.recorded))
    return None if index is None else partial(PairsHost, partial(make_pairs, config, index, bases))


def make_pairs(config: Config, index: PairIndex, bases: Bases | None = None) -> PairsActor:
    """Text encoders and VAE; pictures come through Ray Data where there is a Ray."""
    chosen, device = config.pairs, config.cluster.rollout.device
    assert chosen is not None
    dtype = dtype_of(config.precision.rollout, device)
    family = (bases or Bases()).load(config.model, device, dtype, text=True, image=True)
    order = Order(index, config.seed, chosen.window)
    return PairsActor(
        family,
        lambda side: pair_rows(chosen, order, side, ray=config.cluster.runtime == "ray"),
        size=config.batch.item_size,
        flip=config.seed if chosen.flip else None,
        ahead=chosen.window,
    )


def pair_rows(config: PairsConfig, order: Order, side: int, *, ray: bool) -> Rows:
    """The rows of pairs from a position on, with pictures of a height and width; read here, or by Ray Data."""
    reading = Reading(side, config.on_bad, config.max_bad, min(config.window, order.pairs))
    if not ray:
        return partial(order.rows, reading)
    from opd_ray.runtime import datasets  # imports Ray

    return partial(datasets.rows, order, reading, config.decoders)


def reward(config: Config, entry: str, names: Sequence[str], prompts: Sequence[Prompt]) -> Made:
    """Scores pictures."""
    return partial(RewardHost, partial(make_reward, config, entry, tuple(names), tuple(prompts)))


def judges(config: Config, dispatcher: Dispatcher, pool: Callable[..., Pool], prompts: Sequence[Prompt]) -> Judges:
    """A pool for each reward with an entry of its own in ``cluster.rewards``, and one for all others.

    Args:
        config: its rewards and their placement.
        dispatcher: of the pools.
        pool: makes one, of a role's name, its placement and what makes its host.
        prompts: a few of those whose pictures are scored.
    """
    panels = []
    for entry, names in config.cluster.panels(config.rewards).items():
        placement = config.cluster.of_reward(entry)
        made = pool(reward_role(entry), placement, reward(config, entry, names, prompts))
        panels.append(Panel(made, names, placement.retries, placement.max_failed))
    return Judges(dispatcher, panels)


def make_reward(config: Config, entry: str, names: Sequence[str], prompts: Sequence[Prompt] = ()) -> RewardActor:
    """The rewards of one entry of ``cluster.rewards``; ``prompts``: a few of the run's."""
    placement = config.cluster.of_reward(entry)
    rewards = make_rewards({name: config.rewards[name] for name in names}, placement.device)
    return RewardActor(rewards, batch=placement.batch, retries=placement.retries, prompts=prompts)


def learner(config: Config, rank: int, bases: Bases) -> Made:
    """Trains."""
    return partial(LearnerHost, partial(make_learner, config, rank, bases))


def make_learner(config: Config, rank: int, bases: Bases | None = None) -> Learner:
    """The denoiser alone, with the student's adapter over it or itself to be trained."""
    placement = config.cluster.learner
    dtype = dtype_of(config.precision.learner, placement.device)
    # Where the engine spreads the weights it takes them to the card part by part: all of them may not fit there.
    device = "cpu" if placement.spreads_weights else placement.device
    # Weights that are trained are not rounded to what they compute in.
    family = (bases or Bases()).load(config.model, device, torch.float32 if config.student.lora is None else dtype)
    family.dtype = dtype
    if config.student.lora is None:  # buffers are not published: here they are what they are where it draws
        drawn = dtype_of(config.precision.rollout, config.cluster.rollout.device)
        for buffer in filter(torch.is_floating_point, family.network.buffers()):
            buffer.copy_(buffer.to(drawn))
    training = Training(
        lora=config.student.lora,
        guidance=config.student.guidance,
        optimizer=config.optimizer,
        ema=config.ema,
        seed=config.seed,
        rounds=config.rounds,
        gradient_checkpointing=config.student.gradient_checkpointing,
    )
    algorithm = make_algorithm(config)
    sigmas, times = tuple(family.sigmas(config.sampling.steps).tolist()), family.schedule.training_times()
    algorithm.facts = replace(algorithm.facts, sigmas=sigmas, times=times)
    return Learner(family, algorithm, training, make_engine(placement, rank))
