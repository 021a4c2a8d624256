"""Diffusion-DPO (arXiv 2311.12908 Eq. 14), for models of velocity Flow-DPO (arXiv 2501.13918), and two relatives.

With e the squared error of a prediction at a noised image, of the student (s) or the frozen start (r), the same noise
and time for the better (w) and the worse (l) image of a pair:

    h = -1/2 [(e_s^w - e_r^w) - (e_s^l - e_r^l)]
    dpo   L = -log sigmoid(beta h)
    ipo   L = (beta h - 1/2)^2                     (arXiv 2310.12036 Eq. 17, times beta^2)
    sft   L = e_s^w                                the papers' baseline: fine-tuning on the better image alone

beta holds T omega(lambda_t), as in the published code.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from opd_ray.algorithms.base import Forward, Loss
from opd_ray.algorithms.noised_pairs import NoisedPairs
from opd_ray.config import DpoConfig

__all__ = ["DiffusionDpo", "preference_loss"]

BETAS = {"eps": 5000.0, "velocity": 100.0}
"""Vetted, by the space of errors."""


class DiffusionDpo(NoisedPairs):
    """Makes the better image of a pair the likelier one, against the frozen start."""

    def __init__(self, config: DpoConfig) -> None:
        super().__init__(config)
        self.config = config
        if config.loss == "sft":
            self.velocities, self.worse = (), False  # one image, and nothing to compare it with

    @property
    def beta(self) -> float:
        """As asked for, or the one that is vetted for the space of errors."""
        return self.config.beta or BETAS.get(self.space, 100.0)

    def loss(self, forward: Forward, velocity: Mapping[str, Tensor]) -> Loss:
        """Of each pair, mean over the batch; a tie weighs nothing."""
        if self.config.loss == "sft":
            error, decided = self.error(forward, velocity["student"]), forward.inputs["decided"]
            return Loss((error * decided).mean(), {"error_better": error.detach().mean(), "ties": 1 - decided.mean()})
        found, decided = self.errors(forward, velocity), forward.inputs["decided"].chunk(2)[0]
        h = -0.5 * (found.gain_better - found.gain_worse)
        value = (preference_loss(h, self.beta, ipo=self.config.loss == "ipo") * decided).mean()
        told = {
            "error_better": found.better,
            "error_worse": found.worse,
            "reference_better": found.reference_better,
            "reference_worse": found.reference_worse,
            "ties": 1 - decided,
        }
        preferred = (h.detach() > 0).float() + 0.5 * (h.detach() == 0).float()
        right = (preferred * decided).sum() / decided.sum().clamp(min=1)
        return Loss(value, {name: one.mean() for name, one in told.items()} | {"implicit_accuracy": right})


def preference_loss(h: Tensor, beta: float, *, ipo: bool = False) -> Tensor:
    """The loss of each pair [P] from how much more the student prefers the better image than the reference does."""
    return (beta * h - 0.5).square() if ipo else -logsigmoid(beta * h)
