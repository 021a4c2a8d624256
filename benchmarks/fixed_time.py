"""Hosts whose work is to sleep: what is left of the time is the system's own.

Nothing here imports torch, nor anything that does, so that a worker costs a second and 100 MB: dozens fit on two cores.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd_ray.runtime.handle import Done, RankFacts, Weights
from opd_ray.types import WeightVersion, WorkItem

__all__ = ["Ack", "Learner", "Piece", "Report", "Reward", "Rollout", "Teacher"]

LORA_BYTES = 20_000_000
"""About what a rank-32 LoRA over the attention of Stable Diffusion 3.5 medium has in bf16."""
FLAT_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class Ack:
    """As a rollout worker acknowledges weights."""

    version: WeightVersion
    tensors: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Stands for a share of a round: what a learner rank is told of an item."""

    item: WorkItem
    told: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """Stands for a rank's numbers of an update."""

    loss: float = 0.0


class Host:
    """What all of them answer."""

    def ready(self) -> Done:
        """It is up."""
        return Done(None, 0.0, 0)

    def imported(self) -> Done:
        """Whether it has imported torch."""
        return Done("torch" in sys.modules, 0.0, 0)


def rest(seconds: float) -> float:
    """Sleep, and say how long it was."""
    if seconds <= 0:
        return 0.0
    start = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - start


def claim(file: str) -> bool:
    """Whether this is the first process to ask for it."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Rollout(Host):
    """Draws in ``seconds``, with weights that it was given before."""

    def __init__(self, seconds: float, nbytes: int = FLAT_BYTES) -> None:
        self.seconds, self.nbytes, self.bound = seconds, nbytes, None

    def bind(self, weights: Weights, flat: Any) -> Done:
        """Copy them, as a binding does."""
        start = time.perf_counter()
        self.weights, self.bound = flat.copy(), weights.identity
        return Done(Ack(weights.version, 1, weights.sha256), time.perf_counter() - start, 0)

    def draw(self, item: WorkItem, version: WeightVersion, sha256: str) -> tuple[Any, Done]:
        """A small array."""
        assert self.bound == (version, sha256), f"asked to draw with {version}, bound is {self.bound}"
        seconds = rest(self.seconds)
        return np.zeros(self.nbytes, dtype=np.uint8), Done(item.position, seconds, len(item.prompts))


class Teacher(Host):
    """Marks in ``seconds``; a teacher that it has not used yet takes ``loading`` more."""

    def __init__(
        self,
        seconds: float,
        nbytes: int = FLAT_BYTES,
        *,
        loading: float = 0.0,
        slow: tuple[str, float] | None = None,
    ) -> None:
        """``slow``: the first process that asks for this file takes so many times longer."""
        self.seconds, self.nbytes, self.loading = seconds, nbytes, loading
        self.held: tuple[str, ...] = ()
        if slow is not None and claim(slow[0]):
            Path(slow[0]).write_text(str(os.getpid()))
            self.seconds *= slow[1]

    def score(self, item: WorkItem, teacher: str, *flats: Any) -> tuple[Any, Done]:
        """A small array."""
        loading = 0.0
        if teacher not in self.held:
            loading, self.held = rest(self.loading), (*self.held, teacher)
        seconds = rest(self.seconds) + loading
        flat = np.zeros(self.nbytes, dtype=np.uint8)
        return flat, Done(item.position, seconds, len(item.prompts), holds=self.held, loading=loading)


class Reward(Host):
    """Scores in ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score(self, prompts: Sequence[str], *flats: Any) -> Done:
        """One number a prompt."""
        seconds = rest(self.seconds)
        return Done({"look": [0.0] * len(prompts)}, seconds, 0)


class Learner(Host):
    """One rank: takes an item in ``take`` seconds, steps in ``update``, publishes an array of the size of a LoRA."""

    def __init__(self, take: float, update: float = 0.0, publish: float = 0.0, nbytes: int = LORA_BYTES) -> None:
        self.seconds = {"take": take, "update": update, "publish": publish}
        self.flat = np.zeros(nbytes, dtype=np.uint8)

    def ready(self) -> Done:
        """What a learner rank says of itself."""
        return Done(RankFacts("fp32"), 0.0, 0)

    def begin(self, items: Sequence[WorkItem]) -> Done:
        """A round of these begins."""
        return Done(None, 0.0, 0)

    def take(self, share: Any, *flats: Any) -> Done:
        """This rank's next item."""
        return Done(None, rest(self.seconds["take"]), 1)

    def observe(self, scores: Sequence[Any]) -> Done:
        """Every item's scores."""
        return Done(None, 0.0, 0)

    def update(self, update: int) -> Done:
        """One optimizer step."""
        return Done(Report(), rest(self.seconds["update"]), 0)

    def finish_round(self, round: int) -> Done:
        """The end of it."""
        return Done(None, 0.0, 0)

    def publish(self, version: WeightVersion, average: bool, bucket: int) -> tuple[Any, Done]:
        """An array by return value, and what it is."""
        seconds = rest(self.seconds["publish"])
        return self.flat, Done(Weights(version, f"sha-{version}"), seconds, 0)
