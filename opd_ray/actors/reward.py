"""The reward actor: pictures and their prompts in, one number a picture out; a failure is not a number."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_ray.errors import RewardError
from opd_ray.rewards.base import Scorer
from opd_ray.types import Prompt, Scored

__all__ = ["RewardActor"]

PAUSE_S = 0.1
"""Before what failed is tried again; four times as long before each further time."""


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
            except Exception as error:
                raise RewardError(
                    f"rewards.{name}: its probe raised {_told(error)}. Mend it, or take it out"
                ) from error
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
        size = self._batch or len(prompts)
        found = Scored({name: [] for name in self.rewards}, {})
        for name, scorer in self.rewards.items():
            for start in range(0, len(prompts), size):
                rows = range(start, min(start + size, len(prompts)))
                try:
                    found.scores[name].extend(_asked(scorer, images, prompts, rows))
                    continue
                except RewardError:
                    raise
                except Exception as error:
                    first = error
                tries = max(self._retries, int(len(rows) > 1))  # one that fails must not take its batch along
                for row in rows:
                    score, error_text = self._again(scorer, images, prompts, row, first, tries)
                    found.scores[name].append(score)
                    if error_text:
                        found.errors.setdefault(name, {})[row] = error_text
        return found

    def _again(
        self, scorer: Scorer, images: Tensor, prompts: Sequence[Prompt], row: int, error: Exception, tries: int
    ) -> tuple[float, str]:
        """One picture's score, or NaN and the last error."""
        for attempt in range(tries):
            time.sleep(PAUSE_S * 4**attempt)
            try:
                return _asked(scorer, images, prompts, range(row, row + 1))[0], ""
            except RewardError:
                raise
            except Exception as another:
                error = another
        return float("nan"), _told(error)


def _asked(scorer: Scorer, images: Tensor, prompts: Sequence[Prompt], rows: range) -> list[float]:
    chosen = prompts[rows.start : rows.stop]
    texts, metadata = [prompt.text for prompt in chosen], [prompt.metadata for prompt in chosen]
    scores: list[float] = scorer(images[rows.start : rows.stop], texts, metadata).tolist()
    return scores


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
