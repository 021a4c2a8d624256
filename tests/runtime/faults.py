"""What can go wrong inside a worker: played in its own process, at its next work, without a hook in the package.

A fault replaces one method of the worker's plain actor for a single call. It travels to the worker in front of the
call that it is for, on the same ordered queue.
"""

import math
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from opd_ray.algorithms.opd import Opd
from opd_ray.config import OpdConfig
from opd_ray.run import Run
from opd_ray.runtime.cluster import RayHandle
from opd_ray.types import Scored as Scores

METHODS = {"rollout": {"draw"}, "teacher": {"score"}, "reward": {"score"}, "learner": {"take", "update"}}
"""What a worker of each role does for a living."""


class Scored(Opd):
    """Distillation whose drawings are scored too, so that rewards have work in every round."""

    needs_rewards = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(OpdConfig(**settings))


def kill(answer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(answer: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    return answer


def hang(answer: Any) -> None:
    time.sleep(10**6)


def hold_the_lock(answer: Any) -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")  # in C for longer than anybody lives, and Python's lock with it


def not_a_number(answer: Any) -> Any:
    if hasattr(answer, "latents"):
        return replace(answer, latents=_spoiled(answer.latents))
    return replace(answer, velocity=_spoiled(answer.velocity))


def infinite(answer: Any) -> Any:
    return Scores({name: [math.inf] * len(scores) for name, scores in answer.scores.items()}, {})


def wrong_shape(answer: Any) -> Any:
    if isinstance(answer, Scores):
        return Scores({name: scores[1:] for name, scores in answer.scores.items()}, {})
    if hasattr(answer, "latents"):
        fewer = copy(answer)  # a trajectory refuses this shape where it is made in order
        object.__setattr__(fewer, "latents", answer.latents[1:])
        return fewer
    return replace(answer, velocity=answer.velocity[1:])


def wrong_channels(answer: Any) -> Any:
    """Right in the part of the shape that the driver can know."""
    if hasattr(answer, "latents"):
        return replace(answer, latents=answer.latents[..., 1:])
    return replace(answer, velocity=answer.velocity[:, :, 1:])


def wrong_version(answer: Any) -> Any:
    """Of other weights, or of another teacher; where neither is told, something else altogether."""
    if isinstance(answer, Scores):
        return Scores({"nothing": []}, {})
    if hasattr(answer, "latents"):
        return replace(answer, weights=replace(answer.weights, version=answer.weights.version + 1))
    return replace(answer, teacher="nobody")


def _spoiled(tensor: Any) -> Any:
    tensor = tensor.clone()
    tensor.view(-1)[7] = torch.nan
    return tensor


FAULTS: dict[str, Callable[[Any], Any]] = {
    "kill": kill,
    "stop": stop,
    "hang": hang,
    "lock": hold_the_lock,
    "nan": not_a_number,
    "inf": infinite,
    "shape": wrong_shape,
    "channels": wrong_channels,
    "version": wrong_version,
}
ROLES = {  # NaN is a legitimate score, and scores have no channels
    "rollout": [kind for kind in FAULTS if kind != "inf"],
    "teacher": [kind for kind in FAULTS if kind != "inf"],
    "reward": [kind for kind in FAULTS if kind not in {"nan", "channels"}],
}


@dataclass(frozen=True)
class Strike:
    """A fault for whichever worker of a role is given work next in a round."""

    round: int
    role: str
    kind: str
    method: str = ""
    """At this kind of work alone."""
    rank: int | None = None
    """In this rank of the learner alone."""

    def meets(self, round: int, handle: RayHandle, method: str) -> bool:
        """Whether this call is the one."""
        role, _, number = handle.name.rpartition("-")
        mine = (self.round, self.role) == (round, role.partition(".")[0]) and method in METHODS[self.role]
        return mine and self.method in {"", method} and self.rank in {None, int(number)}


class Saboteur:
    """Strikes as planned; ``struck`` says whom."""

    def __init__(self, run: Run, strikes: Sequence[Strike], patch: Any) -> None:
        self.run, self.left, self.struck = run, list(strikes), dict[Strike, str]()
        self.hit: list[RayHandle] = []
        self.call = RayHandle.call
        patch.setattr(RayHandle, "call", lambda handle, *args, **options: self.calling(handle, *args, **options))

    def calling(self, handle: RayHandle, method: str, *args: Any, bulk: int) -> Any:
        strike = next((one for one in self.left if one.meets(self.run.round, handle, method)), None)
        if strike is not None and handle not in self.hit:  # two calls on their way would spend two faults on one worker
            self.hit.append(handle)
            self.left.remove(strike)
            self.struck[strike] = handle.name
            handle._actor.__ray_call__.remote(partial(arm, method=method, kind=strike.kind))
        return self.call(handle, method, *args, bulk=bulk)


def arm(process: Any, *, method: str, kind: str) -> None:
    """In the worker: its next call of a method ends in a fault."""
    host = process._host
    actor = host.learner if hasattr(host, "learner") else host.actor
    own = getattr(actor, method)

    def once(*args: Any, **options: Any) -> Any:
        setattr(actor, method, own)
        return FAULTS[kind](own(*args, **options))

    setattr(actor, method, once)
