"""Losses over a batch. Built-in by short name, yours by package.module:Class."""

from typing import Any

from opd_ray.algorithms.base import Algorithm, Facts, Forward, Loss
from opd_ray.config import REFERENCE, Config, PluginAlgorithmConfig
from opd_ray.diffusion import KERNELS
from opd_ray.errors import ConfigError
from opd_ray.plugins import check_construction, load

__all__ = ["Algorithm", "Facts", "Forward", "Loss", "make_algorithm"]

ALGORITHMS = {
    "opd": "opd_ray.algorithms.opd:Opd",
    "opd_ppo": "opd_ray.algorithms.opd_ppo:OpdPpo",
    "dmd": "opd_ray.algorithms.dmd:Dmd",
    "tdm": "opd_ray.algorithms.dmd:Tdm",
    "ddpo": "opd_ray.algorithms.ddpo:Ddpo",
    "sdpo_stepwise": "opd_ray.algorithms.sdpo:Sdpo",
    "pso_pairwise": "opd_ray.algorithms.pso:Pso",
    "pso_offline": "opd_ray.algorithms.pso_offline:PsoOffline",
    "diffusion_dpo": "opd_ray.algorithms.dpo:DiffusionDpo",
    "sft": "opd_ray.algorithms.sft:Sft",
    "diffusion_nft": "opd_ray.algorithms.nft:DiffusionNft",
    "flow_grpo": "opd_ray.algorithms.flow_grpo:FlowGrpo",
    "grpo_guard": "opd_ray.algorithms.grpo_guard:GrpoGuard",
}


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that a configuration names, with all that it needs in the configuration.

    Raises:
        ConfigError: it is unknown, no Algorithm, takes other arguments, or what it needs is not there.
    """
    chosen = config.algorithm
    kind: Any = load(chosen.name, ALGORITHMS, "algorithm")
    known = isinstance(kind, type) and issubclass(kind, Algorithm)
    if not known:
        raise ConfigError(f"algorithm {chosen.name!r} is {kind!r}, not a subclass of opd_ray.algorithms.Algorithm")
    if isinstance(chosen, PluginAlgorithmConfig):
        check_construction(kind, chosen.args, "algorithm.args")
        algorithm = kind(**chosen.args)
    else:
        algorithm = kind(chosen)
    assert isinstance(algorithm, Algorithm)
    algorithm.facts = Facts(
        config.seed,
        config.sampling.steps,
        config.batch.images_per_prompt,
        config.cluster.max_staleness,
        reference=REFERENCE in config.teachers,
    )
    _check_needs(config, algorithm)
    return algorithm


def _check_needs(config: Config, algorithm: Algorithm) -> None:
    name = config.algorithm.name
    if algorithm.needs_rollouts and config.drawn is None:
        given = "pairs" if config.pairs is not None else "recorded"
        raise ConfigError(f"algorithm {name} learns from rollouts; give prompts.train in place of {given}")
    if not algorithm.needs_rollouts and config.drawn is not None:
        raise ConfigError(
            f"algorithm {name} learns from recorded experience; give recorded or pairs in place of prompts.train"
        )
    if algorithm.needs_teachers and not config.teachers:
        raise ConfigError(f"algorithm {name} learns from teachers; teachers is empty, add at least one")
    if algorithm.needs_rewards and not config.rewards:
        raise ConfigError(f"algorithm {name} learns from rewards; rewards is empty, add at least one")
    if algorithm.streams and (algorithm.updates_per_round != 1 or type(algorithm).select is not Algorithm.select):
        raise ConfigError(
            f"algorithm {name} streams, but has {algorithm.updates_per_round} updates a round or selects items; "
            "set streams = False"
        )
    if algorithm.kernel not in KERNELS:
        raise ConfigError(f"algorithm {name} draws with kernel {algorithm.kernel!r}; known: {', '.join(KERNELS)}")
    if algorithm.trained and config.cluster.learner.backend == "deepspeed":
        raise ConfigError(
            f"algorithm {name} also trains {', '.join(algorithm.trained)}, whose gradients DeepSpeed would not reduce; "
            "set cluster.learner.backend to ddp or fsdp2"
        )
    known = ("student", *algorithm.adapters)
    for policy in (algorithm.behaviour, *algorithm.velocities):
        if policy not in known and (policy != "reference" or policy == algorithm.behaviour):
            raise ConfigError(
                f"algorithm {name} uses policy {policy!r}, which is not among its adapters {', '.join(known)}"
            )
