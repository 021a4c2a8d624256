"""Losses over a batch. Built-in by short name, yours by package.module:Class."""

from opd_ray.algorithms.base import Algorithm, Forward, Loss
from opd_ray.config import Config, OpdConfig
from opd_ray.plugins import check_arguments, load

__all__ = ["Algorithm", "Forward", "Loss", "make_algorithm"]

ALGORITHMS = {"opd": "opd_ray.algorithms.opd:Opd"}


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that a configuration names."""
    chosen = config.algorithm
    kind = load(chosen.name, ALGORITHMS, "algorithm")
    if isinstance(chosen, OpdConfig):
        algorithm = kind(chosen)
    else:
        check_arguments(kind, chosen.args, "algorithm.args")
        algorithm = kind(**chosen.args)
    assert isinstance(algorithm, Algorithm)
    return algorithm
