"""What a role's workers did with their time: cumulative worker-seconds, of which readers take differences."""

from dataclasses import astuple, dataclass

__all__ = ["Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one pool, since it was made. Idle time has a reason: nothing has come yet, or nobody takes more."""

    seconds: float = 0.0
    """Wall time."""
    workers: float = 0.0
    """Worker-seconds of those that were up."""
    busy: float = 0.0
    """Worker-seconds at work, as the workers themselves measured."""
    transfer: float = 0.0
    """Worker-seconds between a request and its answer in which no work was done: transport, Ray, loading inputs."""
    input: float = 0.0
    """Worker-seconds without a request while jobs of this role wait for what other roles have to make first."""
    output: float = 0.0
    """Worker-seconds without a request and without any job: whoever takes the results has to ask for more first."""
    queued: float = 0.0
    """Wall seconds in which at least one job could have run and found no free worker."""
    answers: int = 0

    def __sub__(self, earlier: "Usage") -> "Usage":
        """What came after ``earlier``."""
        return Usage(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))
