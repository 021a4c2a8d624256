"""Pairwise sample optimization from recorded pairs (PSO, arXiv 2410.03190), for few-step models.

Images are noised to one of the model's own few times and nowhere else. With e the squared error of the predicted noise,
of the student (s) or the frozen start (r), for the wanted (w) and the other (l) image, both under the wanted's prompt:

    pairwise   L = -log sigmoid(beta [(e_r^w - e_s^w) - gamma (e_r^l - e_s^l)])
    hinge      L = relu(1 + beta (e_s^w - gamma e_s^l)) + keep e_s^l       for a concept from a handful of pictures

The papers' script names gamma `neg_defactor`; the last term of the hinge, which keeps what the model drew
before, is its `prior_loss_weight`: beta gamma = keep leaves the other image alone until the wanted one is learned.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.noised_pairs import NoisedPairs
from opd_ray.config import PsoOfflineConfig

__all__ = ["PsoOffline", "hinge"]


class PsoOffline(NoisedPairs):
    """Style and concepts from pictures, kept to few steps."""

    def __init__(self, config: PsoOfflineConfig) -> None:
        super().__init__(config)
        self.config = config
        if config.loss == "hinge":
            self.velocities = ()  # it has no reference

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """Of each pair, mean over the batch."""
        beta, gamma = self.config.beta, self.config.gamma
        if self.config.loss == "hinge":
            wanted, other = self.error(forward, velocity["student"]).chunk(2)
            value = hinge(wanted, other, beta, gamma, self.config.keep).mean()
            return Loss(value, {"error_better": wanted.detach().mean(), "error_worse": other.detach().mean()})
        found = self.errors(forward, velocity)
        margin = -beta * (found.gain_better - gamma * found.gain_worse)
        told = {"error_better": found.better, "error_worse": found.worse, "accuracy": (margin.detach() > 0).float()}
        return Loss((-logsigmoid(margin)).mean(), {name: one.mean() for name, one in told.items()})


def hinge(wanted: Tensor, other: Tensor, beta: float, gamma: float, keep: float) -> Tensor:
    """relu(1 + beta (wanted - gamma other)) + keep other, of each pair [P]."""
    return relu(1 + beta * (wanted - gamma * other)) + keep * other
