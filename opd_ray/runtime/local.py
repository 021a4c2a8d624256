"""Every role in this process, one call after the other: set a breakpoint anywhere."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from opd_ray.runtime.handle import Call, Done, Handle, Ref, WorkerSpec

__all__ = ["LocalBackend"]


class _Slot:
    """Stands where a stored record would be; an error is raised when somebody looks."""

    def __init__(self, outcome: Done | Exception) -> None:
        self.outcome = outcome


class LocalHandle:
    """A host in this process. Threads are set before each call, since roles differ in them."""

    def __init__(self, spec: WorkerSpec, name: str) -> None:
        self.name = name
        self._spec = spec
        self._host: Any = None

    def call(self, method: str, *args: Any, bulk: int) -> Call:
        """Run the method now."""
        torch.set_num_threads(self._spec.threads)
        try:
            if self._host is None:
                self._host = self._spec.factory()
            results = getattr(self._host, method)(*args)
        except Exception as error:  # the work's own error, kept for whoever waits
            return Call((None,) * bulk, _Slot(error))
        if bulk == 0:
            return Call((), _Slot(results))
        return Call(tuple(results[:-1]), _Slot(results[-1]))

    def beat(self, *, stack: bool = False) -> None:
        """It lives as long as this process."""

    def kill(self) -> None:
        """Let go of the host."""
        self._host = None


class LocalBackend:
    """No processes, no Ray, the same bits."""

    def start(self, spec: WorkerSpec, name: str) -> Handle:
        """A handle; its host is made at the first call."""
        return LocalHandle(spec, name)

    def start_group(
        self, specs: Sequence[WorkerSpec], timeout_s: float, idle: Callable[[], None] = lambda: None
    ) -> list[Handle]:
        """Handles in order; local runs have one learner rank."""
        return [LocalHandle(spec, f"{spec.role}-{rank}") for rank, spec in enumerate(specs)]

    def shortage(self, specs: Sequence[WorkerSpec], *, free: bool = False) -> str | None:
        """There is always room."""
        return None

    def end_group(self, handles: Sequence[Handle]) -> None:
        """Let go of their hosts."""
        for handle in handles:
            handle.kill()

    def object_store(self) -> None:
        """There is none."""

    def wait(self, refs: Collection[Ref], timeout_s: float) -> list[Ref]:
        """All of them: calls have run already."""
        return list(refs)

    def result(self, ref: Ref) -> Done:
        """The record, or the method's own error."""
        assert isinstance(ref, _Slot)
        if isinstance(ref.outcome, Exception):
            raise ref.outcome
        return ref.outcome

    def close(self) -> None:
        """Nothing to end."""
