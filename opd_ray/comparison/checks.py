"""What of a protocol can be refused before its first run, as far as files, models and plugins say."""

from pathlib import Path

from opd_ray.algorithms import make_algorithm
from opd_ray.comparison.nodes import Node, Place, key_of, overrides_of
from opd_ray.comparison.protocol import PREFIX, OnBad, Protocol, prompts_in
from opd_ray.config import Config
from opd_ray.errors import ConfigError, UserError
from opd_ray.evaluation.models import find_model
from opd_ray.models.base import sigmas_of
from opd_ray.plugins import load as load_plugin
from opd_ray.preflight import Prompts, check_whole
from opd_ray.recipes import load
from opd_ray.rewards.base import FINITE, PROBE, check_rewards

__all__ = ["check"]


def check(protocol: Protocol, place: Place, where: Path) -> None:
    """Refuse what judging or training would stumble over hours later. Folders of other arms need not be there yet.

    Args:
        protocol: as it is written, not shortened.
        place: of the comparison.
        where: the protocol's file, for messages.

    Raises:
        ConfigError: what is wrong, and where in the file.
    """
    _check_judged(protocol, where)
    for task, path in protocol.copies.items():
        found = _prompts(path, None, "stop", f"{where}: copies.{task}")
        if len(found) != 1:
            raise ConfigError(
                f"{where}: copies.{task}: {path} has prompts of {', '.join(found)}; give a file of one task"
            )
    for name, arm in protocol.arms.items():
        if arm.do not in {"train", "record"}:
            continue
        assert arm.recipe is not None
        seed, rate = protocol.seeds[0], protocol.tuning.rates[0]
        node = Node(key_of(protocol, name, seed), "train", name, seed, (), rate)
        try:
            _check_run(load(arm.recipe, overrides_of(protocol, node, place)), protocol, place)
        except UserError as error:
            raise ConfigError(f"{where}: arms.{name}: {error}") from None


def _check_judged(protocol: Protocol, where: Path) -> None:
    """Model, rewards, true pictures, and as many prompts as are asked for."""
    judged, tuning = protocol.judged, protocol.tuning
    curves = any(arm.curve for arm in protocol.arms.values())
    shown = max(judged.images_per_task, judged.curve_images if curves else 0)
    asked = "judged.images_per_task" if shown == judged.images_per_task else "judged.curve_images"
    for task, path in judged.prompts.items():
        _check_rows(path, task, shown, f"{where}: judged.prompts.{task}", asked)
    for task in judged.averaged if len(tuning.rates) > 1 else ():
        place = f"{where}: tuning.prompts.{task}"
        _check_rows(tuning.prompts[task], task, tuning.images_per_task, place, "tuning.images_per_task")
    for task, names in judged.rewards.items():
        try:
            check_rewards({name: {PROBE: FINITE} for name in names}, {}, ())
        except UserError as error:
            raise ConfigError(f"{where}: judged.rewards.{task}: {error}") from None
    try:
        find_model(judged.model)
    except UserError as error:
        raise ConfigError(f"{where}: judged.model: {error}") from None
    if judged.truth is not None:
        try:
            truth = load_plugin(judged.truth, {}, "judged.truth")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if not callable(truth):
            raise ConfigError(f"{where}: judged.truth {judged.truth} is no function of prompts' texts")


def _check_rows(path: str, task: str, count: int, where: str, asked: str) -> None:
    rows = len(_prompts(path, task, "stop", where)[task])
    if rows < count:
        raise ConfigError(f"{where}: {path} has {rows} prompts, and {asked} is {count}; lower it, or give more prompts")


def _check_run(config: Config, protocol: Protocol, place: Place) -> None:
    """As `opd-ray train` would, but for LoRAs and recordings, which may be other arms'."""
    algorithm = make_algorithm(config)
    if config.prompts is not None:
        copied = {str(place.prompts / f"{task}.txt"): path for task, path in protocol.copies.items()}
        for key, spec in (("prompts.train", config.drawn), ("prompts.eval", config.prompts.eval)):
            files = {None: spec} if isinstance(spec, str) else spec or {}
            tasks = list[str]()
            for task, path in files.items():
                if path in copied:  # written when the comparison begins; its source was read
                    tasks.append(str(task))
                else:
                    tasks += _prompts(path, task, config.prompts.on_bad, key)
            if key == "prompts.train" and tasks:
                config.check_tasks(tasks)
    algorithm.check(sigmas_of(config.model, config.sampling.steps))
    check_rewards(config.rewards, {}, ())
    check_whole(config, algorithm)


def _prompts(path: str, task: str | None, on_bad: OnBad, where: str) -> Prompts:
    try:
        return prompts_in(path, task, on_bad)
    except UserError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{PREFIX}: ')}") from None
