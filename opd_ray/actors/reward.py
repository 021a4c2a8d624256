"""The reward actor: pictures and their prompts in, one number a picture out; a failure is not a number."""

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_ray.errors import RewardError
from opd_ray.rewards.base import Scorer, told
from opd_ray.types import Prompt, Scored

__all__ = ["RewardActor"]

PAUSE_S, MAX_PAUSE_S = 0.1, 10.0
"""Before what failed is tried again; four times as long before each further time, up to the second."""


class RewardActor:
    """Holds rewards of a run.

    Args:
        rewards: by name.
        batch: pictures that each is given at once; all that come together where None.
        retries: how often a picture is tried again; what failed in a batch is tried alone at least once.
        prompts: some of the run's, for rewards that are proven by their answering at all.
    """

    def __init__(
        self,
        rewards: Mapping[str, Scorer],
        *,
        batch: int | None = None,
        retries: int = 0,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        self.rewards = rewards
        self._batch, self._retries, self._prompts = batch, retries, prompts

    @torch.no_grad()
    def prove(self) -> dict[str, str]:
        """Reward -> how it proved itself.

        Raises:
            RewardError: it did not.
        """
        proofs = {}
        for name, scorer in self.rewards.items():
            try:
                proofs[name] = scorer.prove(self._prompts)
            except RewardError:
                raise
            except (Exception, SystemExit) as error:
                raise RewardError(f"rewards.{name}: its probe raised {told(error)}. Mend it, or take it out") from error
        return proofs

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scored:
        """Every reward's scores, and the errors of those pictures that one could not score.

        What raises is tried again, picture by picture, so that one that cannot be scored takes no others with it.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B prompts.

        Raises:
            RewardError: a reward answered with another shape, or not with numbers.
        """
        found = Scored({}, {})
        for name, scorer in self.rewards.items():
            scores, errors = self._scored(scorer, images, prompts)
            for row in _odd(scores, errors, prompts):
                errors[row] = "answered NaN, and a number for another picture of the same prompt"
            found.scores[name] = scores
            if errors:
                found.errors[name] = errors
        return found

    def _scored(self, scorer: Scorer, images: Tensor, prompts: Sequence[Prompt]) -> tuple[list[float], dict[int, str]]:
        """A number a picture, and the last error of each that has none."""
        size, alone = self._batch or len(prompts), 0
        scores, errors = [math.nan] * len(prompts), dict[int, str]()
        for start in range(0, len(prompts), size):
            rows = range(start, min(start + size, len(prompts)))
            try:
                scores[rows.start : rows.stop] = _asked(scorer, images, prompts, rows)
            except RewardError:
                raise
            except (Exception, SystemExit) as error:
                errors |= dict.fromkeys(rows, told(error))
                alone = max(alone, int(len(rows) > 1))  # one that fails must not take its batch along
        for attempt in range(max(self._retries, alone)):
            if not errors:
                break
            time.sleep(min(PAUSE_S * 4**attempt, MAX_PAUSE_S))
            for row in [*errors]:
                try:
                    (scores[row],) = _asked(scorer, images, prompts, range(row, row + 1))
                    del errors[row]
                except RewardError:
                    raise
                except (Exception, SystemExit) as error:
                    errors[row] = told(error)
        return scores, errors


def _odd(scores: Sequence[float], errors: Mapping[int, str], prompts: Sequence[Prompt]) -> list[int]:
    """Rows with NaN, which means that the reward does not apply to the prompt, where it did for the prompt's others."""
    applies = {prompt.id for prompt, score in zip(prompts, scores, strict=True) if not math.isnan(score)}
    return [
        row
        for row, (prompt, score) in enumerate(zip(prompts, scores, strict=True))
        if math.isnan(score) and row not in errors and prompt.id in applies
    ]


def _asked(scorer: Scorer, images: Tensor, prompts: Sequence[Prompt], rows: range) -> list[float]:
    chosen = prompts[rows.start : rows.stop]
    texts, metadata = [prompt.text for prompt in chosen], [prompt.metadata for prompt in chosen]
    scores: list[float] = scorer(images[rows.start : rows.stop], texts, metadata).tolist()
    return scores
