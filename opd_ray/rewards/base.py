"""A reward: pictures and prompts to numbers. It proves itself before its first number counts."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from opd_ray.errors import ConfigError, RewardError, UserError
from opd_ray.plugins import check_arguments, check_construction, load
from opd_ray.rewards.probes import Probe
from opd_ray.types import Prompt

__all__ = ["REWARDS", "Reward", "Scorer", "check_rewards", "make_rewards"]

REWARDS = {
    "compose": "opd_ray.world.scorers:compose",
    "compose_partial": "opd_ray.world.scorers:compose_partial",
    "text": "opd_ray.world.scorers:text",
    "look": "opd_ray.world.scorers:look",
    "pickscore": "opd_ray.rewards.pickscore:PickScore",
    "clipscore": "opd_ray.rewards.clipscore:ClipScore",
    "aesthetic": "opd_ray.rewards.aesthetic:Aesthetic",
    "hpsv2": "opd_ray.rewards.hpsv2:HPSv2",
    "hpsv2_1": "opd_ray.rewards.hpsv2:HPSv21",
    "imagereward": "opd_ray.rewards.imagereward:ImageReward",
    "ocr": "opd_ray.rewards.ocr:Ocr",
    "ocr_exact": "opd_ray.rewards.ocr:OcrExact",
    "geneval": "opd_ray.rewards.geneval:GenEval",
    "geneval_strict": "opd_ray.rewards.geneval:GenEvalStrict",
    "geneval_partial": "opd_ray.rewards.geneval:GenEvalPartial",
    "jpeg_compressibility": "opd_ray.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "opd_ray.rewards.jpeg:JpegIncompressibility",
}

PROBE = "probe"
"""Of a reward's entry in a configuration; everything else in it is a keyword argument."""
FINITE = "finite"
"""The reward is asked for numbers alone, since it has no pairs that it has to rank."""


class Reward(Protocol):
    """A function of this shape, or a class whose objects are called like one; it is made once a worker.

    With a parameter ``metadata`` it is also given that of each prompt: the other columns of its row in its file. A
    class with a parameter ``device`` is made with that of its worker. A method ``probes()`` gives the pairs of pictures
    (``Probe``) that it has to rank. An attribute ``weights`` names the files that it scores with and their sha256.
    """

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] for images [B, 3, H, W] in [0, 1]; NaN where the reward does not apply to a prompt."""
        ...


class Scorer:
    """A reward of a run, whose answers are checked.

    Args:
        name: of the reward, in errors.
        reward: what scores.
        finite: it may be used without having ranked anything.
    """

    def __init__(self, name: str, reward: Reward, *, finite: bool = False) -> None:
        self.name, self.finite = name, finite
        self._reward: Any = reward
        function = reward.func if isinstance(reward, partial) else reward
        self._probes = getattr(function, "probes", None)
        self._wants_metadata = "metadata" in inspect.signature(reward).parameters

    @property
    def weights(self) -> dict[str, str]:
        """Files that it scores with -> their sha256, as far as it says them."""
        return dict(getattr(self._reward, "weights", {}))

    @property
    def has_probes(self) -> bool:
        """Whether it says what it has to rank."""
        return self._probes is not None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Scores [B] float32; NaN where the reward does not apply to a prompt.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B of them.
            metadata: of each; nothing is known of them where it is not given.

        Raises:
            RewardError: it answered with another shape, or not with numbers.
        """
        return self._scored(images, prompts, metadata)

    def _scored(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], at: str = ""
    ) -> Tensor:
        """As ``__call__``; ``at`` says in errors of which pictures."""
        told = {"metadata": list(metadata) or [{} for _ in prompts]} if self._wants_metadata else {}
        answer = self._reward(images.clone(), list(prompts), **told)  # what it writes into them is its own business
        try:
            score = torch.as_tensor(answer, dtype=torch.float32).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise RewardError(
                f"reward {self.name} answered {answer!r}{at}; expected a number for each picture (shape "
                f"[{len(prompts)}]); mend it, or take it out"
            ) from None
        if score.shape != (len(prompts),):
            raise RewardError(
                f"reward {self.name} answered shape {list(score.shape)}{at}; expected a number for each picture (shape "
                f"[{len(prompts)}]); mend it, or take it out"
            )
        if score.isinf().any():
            raise RewardError(f"reward {self.name} answered infinity; NaN is for pictures that it does not apply to")
        return score

    def prove(self, prompts: Sequence[Prompt] = ()) -> str:
        """Ask for what is known before anything counts; returns how it proved itself.

        Args:
            prompts: of the run, a few, for a reward that is asked for numbers alone.

        Raises:
            RewardError: it ranks nothing, or wrongly, or answers with no numbers.
        """
        if self.finite:
            return self._answers(prompts)
        if self._probes is None:
            raise RewardError(
                f"rewards.{self.name}: it has no probes() that show that it works; give it pairs of pictures that it "
                f"has to rank (opd_ray.rewards.Probe), or use it unproven and say so, as {{{self.name}: {{{PROBE}: "
                f"{FINITE}}}}}"
            )
        probes: Sequence[Probe] = self._probes()
        for number, probe in enumerate(probes, start=1):
            (better, of_better), (worse, of_worse) = probe.better, probe.worse
            scores = [
                float(self._scored(image[None], [prompt], [probe.metadata], " on its probe picture")[0])
                for image, prompt in ((better, of_better), (worse, of_worse))
            ]
            if not scores[0] > scores[1]:
                same = "the same, " if scores[0] == scores[1] else ""
                raise RewardError(
                    f"rewards.{self.name}: it does not work: of probe pair {number} of {len(probes)} it scores the "
                    f"better picture ({of_better!r}) {same}{scores[0]:.6g}, the worse one ({of_worse!r}) "
                    f"{scores[1]:.6g}. Mend it or its files, or take it out"
                )
        return f"ranks {len(probes)} probe pair{'s' * (len(probes) != 1)}"

    def _answers(self, prompts: Sequence[Prompt]) -> str:
        """One of the prompts has to get a number; that it cannot score another one is not against it."""
        known = prompts or [Prompt("probe", "a photograph", "probe")]
        image, failed = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), None
        for prompt in known:
            try:
                if not self._scored(image, [prompt.text], [prompt.metadata], " on its probe picture").isnan().all():
                    return FINITE
            except RewardError:
                raise
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed
        raise RewardError(
            f"rewards.{self.name}: it answers NaN, which means that it does not apply, for each of {len(known)} "
            f"prompts, first {known[0].text!r}; take it out, or mend it"
        )


def make_rewards(rewards: Mapping[str, Mapping[str, Any]], device: str = "cpu") -> dict[str, Scorer]:
    """Rewards by name; a class is made with its keyword arguments, a function is called with them every time."""
    made: dict[str, Scorer] = {}
    for name, entry in rewards.items():
        reward, args = load(name, REWARDS, "reward"), _arguments(entry)
        _check(name, reward, args)
        if isinstance(reward, type):
            here = {"device": device} if "device" in inspect.signature(reward).parameters else {}
            ready = _made(name, partial(reward, **(here | args)))
        else:
            ready = partial(reward, **args) if args else reward
        made[name] = Scorer(name, ready, finite=entry.get(PROBE) == FINITE)
    return made


def _made(name: str, make: Callable[[], Reward]) -> Reward:
    try:
        return make()
    except UserError:
        raise
    except Exception as error:
        raise RewardError(f"rewards.{name}: making it raised {told(error)}. Mend it or its arguments") from error


def told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def check_rewards(
    rewards: Mapping[str, Mapping[str, Any]],
    by_task: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    elsewhere: Collection[str] = (),
) -> None:
    """Refuse unknown rewards and arguments, held-out tasks that no reward scores, and scores of tasks without prompts.

    Args:
        rewards: of the configuration.
        by_task: held-out task -> rewards that score it.
        tasks: held-out ones.
        elsewhere: rewards whose packages this process need not have: their workers look at them.

    Raises:
        ConfigError: which, and what is there.
    """
    for name, entry in rewards.items():
        if PROBE in entry and entry[PROBE] != FINITE:
            raise ConfigError(
                f"rewards.{name}.{PROBE}: {entry[PROBE]!r}; expected {FINITE}, or no such key: it has to rank its pairs"
            )
        if name not in elsewhere:
            reward = load(name, REWARDS, "reward")
            _check(name, reward, _arguments(entry))
            if PROBE not in entry and not hasattr(reward, "probes"):
                Scorer(name, reward).prove()
    for task in by_task:
        if task not in tasks:
            raise ConfigError(
                f"evaluation.rewards.{task}: there are no held-out prompts of that task; prompts.eval has "
                f"{', '.join(tasks) or 'none'}. Add them or remove the entry"
            )
    for task in tasks:
        for name in by_task.get(task, (task,)):
            if name not in rewards:
                raise ConfigError(
                    f"held-out task {task!r} is scored by {name!r}, which is not among rewards "
                    f"({', '.join(rewards) or 'none'}); add it there or name another in evaluation.rewards.{task}"
                )


def _arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != PROBE}


def _check(name: str, reward: Any, args: Mapping[str, Any]) -> None:
    where = f"rewards.{name}"
    if isinstance(reward, type) and any("__call__" in vars(base) for base in reward.__mro__):
        check_construction(reward, args, where)
    elif isinstance(reward, type) or not callable(reward):
        what = "a class without __call__" if isinstance(reward, type) else f"of type {type(reward).__name__}"
        raise ConfigError(
            f"{where} is {what}; expected a function of pictures and prompts, or a class whose objects are called "
            "like one"
        )
    else:
        check_arguments(reward, args, where)
