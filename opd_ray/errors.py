"""The error tree. A message says what is wrong, what was seen, what was allowed and what to do, in one line.

    OpdRayError
    ├── UserError                 exit 2: the user can fix it; shown without a traceback
    │   ├── ConfigError           a configuration that cannot run (also ValueError)
    │   ├── PromptError           a prompt file that cannot be read or a row without a task
    │   ├── ModelError            a checkpoint or LoRA that is missing or does not fit
    │   ├── RewardError           a reward that answers with something else than numbers
    │   ├── RunFolderError        an output folder that belongs to another run, or a broken checkpoint
    │   └── PlacementError        workers that the cluster has no room for
    ├── Stopped                   exit 3: the run stopped and can be resumed
    │   ├── NotFiniteError        NaN or infinity in an answer, a loss or a weight
    │   ├── TooManyFailedError    a reward failed on more pictures than it may
    │   ├── DiskFullError         there was no room for a file
    │   ├── DriftError            rollout and learner compute differently; nothing of the round was trained
    │   └── LearnerLostError      a learner rank died or does not answer; the run begins again from its checkpoint
    └── RuntimeFault              exit 1: inside one run the pool may still recover from it
        ├── StaleWeightsError     a draw was asked of weights whose delivery was not proven
        ├── WorkerLostError       a worker died or does not answer
        ├── InputLostError        a stored object is gone: its producer has to run again
        ├── BadInputError         a stored object is not what it should be: its producer has to run again elsewhere
        └── OutOfOrderError       a learner rank was given an item before the one that it waits for

Every error crosses process borders, so each takes one message and stays picklable.
"""

__all__ = [
    "BadInputError",
    "ConfigError",
    "DiskFullError",
    "DriftError",
    "InputLostError",
    "LearnerLostError",
    "ModelError",
    "NotFiniteError",
    "OpdRayError",
    "OutOfOrderError",
    "PlacementError",
    "PromptError",
    "RewardError",
    "RunFolderError",
    "RuntimeFault",
    "StaleWeightsError",
    "Stopped",
    "TooManyFailedError",
    "UserError",
    "WorkerLostError",
]


class OpdRayError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1


class UserError(OpdRayError):
    """Something the user can fix. Shown in one line, without a traceback."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration that cannot run."""


class PromptError(UserError, ValueError):
    """A prompt file that cannot be read, is empty, or has a row without a task."""


class ModelError(UserError, ValueError):
    """A checkpoint or LoRA that is missing, has another architecture, or changes nothing."""


class RewardError(UserError, ValueError):
    """A reward that answers with another shape, or not with numbers."""


class RunFolderError(UserError):
    """An output folder that belongs to another run, or no usable checkpoint in it."""


class PlacementError(UserError):
    """Workers that the cluster has no room for."""


class Stopped(OpdRayError):
    """The run stopped before its end, with its last checkpoint in place."""

    exit_code = 3


class NotFiniteError(Stopped, ArithmeticError):
    """NaN or infinity in an answer, a loss or a weight."""


class TooManyFailedError(Stopped):
    """A reward failed on more pictures than it may."""


class DiskFullError(Stopped):
    """There was no room for a file."""


class DriftError(Stopped):
    """Rollout and learner compute differently, as a round's first update finds before it changes a weight."""


class LearnerLostError(Stopped):
    """A learner rank died or does not answer. It stops a run only where the group cannot be rebuilt."""


class RuntimeFault(OpdRayError):
    """A fault of the running system."""


class StaleWeightsError(RuntimeFault):
    """A draw was asked of weights that this worker has not bound and proven."""


class WorkerLostError(RuntimeFault):
    """A worker died or does not answer."""


class InputLostError(RuntimeFault):
    """A stored object is gone; the work item that produced it has to run again."""


class BadInputError(RuntimeFault):
    """What another worker answered has a wrong shape, or NaN or infinity where its own reader found none before.

    Args:
        what: `trajectory`, `answer` or `images`: which of the reader's inputs.
        text: what is wrong with it.
        part: which part of it, where it came in several and one of them is to blame.
    """

    def __init__(self, what: str, text: str, part: int | None = None) -> None:
        super().__init__(what, text, part)  # all, so that it survives pickling
        self.what, self.part = what, part

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class OutOfOrderError(RuntimeFault):
    """A learner rank was given an item before the one that it waits for: the one before it did not arrive."""
