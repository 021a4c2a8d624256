"""Other numbers of workers while a run goes on: a person's word, and autoscale. Without Ray."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from opd_ray.config import Autoscale
from opd_ray.errors import ConfigError
from opd_ray.runtime.autoscale import Autoscaler
from opd_ray.runtime.usage import Measured, PoolStatus

__all__ = ["Scalable", "Scaler"]

MOST = 1000
"""Workers of one role. More is a typing error, and would drown Ray in actors that find no room."""


class Scalable(Measured, Protocol):
    """What is needed of a pool."""

    @property
    def size(self) -> int:
        """How many workers it aims at. It takes a growth back by itself where there is no room."""
        ...

    def resize(self, size: int) -> None:
        """Aim at another number: new workers start, surplus ones finish what they hold and go."""
        ...


class Scaler:
    """The sizes of all elastic roles of one run."""

    def __init__(
        self, pools: Mapping[str, Scalable], autoscale: Mapping[str, Autoscale] | None = None, *, fixed: str = ""
    ) -> None:
        """To be made while every pool still aims at what the configuration says.

        Args:
            pools: by role.
            autoscale: limits by role, of those that follow their load.
            fixed: why nothing can be scaled in this run; empty where it can.
        """
        self._pools, self._fixed = pools, fixed
        self._configured = self.targets()
        self._autoscalers = {role: Autoscaler(limits) for role, limits in (autoscale or {}).items() if role in pools}

    def request(self, targets: Mapping[str, int]) -> str:
        """Do what a person asked: all of it, or nothing.

        Args:
            targets: wanted workers by role or, where each has its own, by a teacher's bare name.

        Returns:
            A line for each role, for instance ``rollout 1 -> 2``.

        Raises:
            ConfigError: a name or a number that cannot be; nothing was changed.
        """
        if self._fixed:
            raise ConfigError(self._fixed)
        if not targets:
            raise ConfigError(f"nothing to scale; known: {', '.join(self._pools)}")
        wanted: dict[str, int] = {}
        for name, number in targets.items():
            role = self._role(name)
            if wanted.setdefault(role, number) != number:
                raise ConfigError(f"{role} is asked to be {wanted[role]} and {number}; give one number")
            self._check(role, number)
        return "\n".join(self._aim(role, number) for role, number in wanted.items())

    def tick(self) -> list[str]:
        """Let autoscaled roles follow their load; to be called about once a second. Returns a line for each change."""
        lines = []
        for role, autoscaler in self._autoscalers.items():
            pool = self._pools[role]
            status = pool.describe()
            settled = not (status.starting or status.draining)
            before, after = pool.size, autoscaler.decide(pool.size, pool.usage, settled=settled)
            if after != before:
                pool.resize(after)
                lines.append(f"autoscale: {role} {before} -> {after}")
        return lines

    def targets(self) -> dict[str, int]:
        """How many workers each role aims at now."""
        return {role: pool.size for role, pool in self._pools.items()}

    def state(self) -> dict[str, list[int]]:
        """For the checkpoint: the configured and the present number of each role."""
        return {role: [self._configured[role], number] for role, number in self.targets().items()}

    def restore(self, saved: Mapping[str, Sequence[int]]) -> list[str]:
        """Take back the numbers of ``state``, but where the configuration says another one now: that was meant.

        Returns:
            A line for each change.
        """
        lines = []
        for role, (configured, target) in saved.items():
            if self._fixed or self._configured.get(role) != configured:
                continue
            with contextlib.suppress(ConfigError):  # limits that have changed since
                self._check(role, target)
                if target != self._pools[role].size:
                    lines.append(f"{self._aim(role, target)}, as before")
        return lines

    def _aim(self, role: str, number: int) -> str:
        pool = self._pools[role]
        before = pool.size
        if role in self._autoscalers:
            self._autoscalers[role].aim(number, pool.usage)
        if number == before:
            return f"{role} is {number} already"
        pool.resize(number)
        return f"{role} {before} -> {number}"

    def _role(self, name: str) -> str:
        if name in self._pools:
            return name
        if f"teacher.{name}" in self._pools:
            return f"teacher.{name}"
        if name == "learner":
            raise ConfigError("the learner cannot be scaled: its ranks are fixed for the run")
        shared = self._shared()
        if shared is not None and name.removeprefix("teacher.") in shared.teachers:
            raise ConfigError(f"teachers are shared: scale `teacher`, not {name}")
        raise ConfigError(f"no role {name!r}; known: {', '.join(self._pools)}")

    def _shared(self) -> PoolStatus | None:
        return self._pools["teacher"].describe() if "teacher" in self._pools else None

    def _check(self, role: str, number: Any) -> None:
        if type(number) is not int or number < 0:
            raise ConfigError(f"{role}={number}: expected a number of workers from 1 on")
        if number == 0:
            raise ConfigError(f"{role}=0: it has work to do in every round; the least is 1")
        if number > MOST:
            raise ConfigError(f"{role}={number}: more than {MOST} workers; expected a smaller number")
        if role in self._autoscalers:
            limits = self._autoscalers[role].limits
            if not limits.min <= number <= limits.max:
                raise ConfigError(f"{role}={number}: autoscale keeps it within {limits.min} to {limits.max}")
