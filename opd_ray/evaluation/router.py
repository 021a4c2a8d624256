"""An oracle router: it knows each prompt's task and lets that task's specialist draw. The row above any one student."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from opd_ray.errors import ConfigError

__all__ = ["ROUTER", "Router", "read_router"]

ROUTER = "router"
"""What tables call it."""


@dataclass(frozen=True, slots=True)
class Router:
    """Task -> model, as models are named on the command line."""

    by_task: Mapping[str, str]
    rest: str | None = None
    """Draws the tasks that are not named."""

    @property
    def models(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys([*self.by_task.values(), *([self.rest] if self.rest else [])]))

    def routes(self, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Model -> the tasks that it draws, of these.

        Raises:
            ConfigError: a task has no model, or one that is named is not there.
        """
        for task in self.by_task:
            if task not in tasks:
                raise ConfigError(f"--router {task}: no such task; the prompts have {', '.join(tasks)}")
        found: dict[str, tuple[str, ...]] = {}
        for task in tasks:
            model = self.by_task.get(task, self.rest)
            if model is None:
                raise ConfigError(
                    f"--router has no model for task {task}; add --router {task}=MODEL, or --router MODEL for the rest"
                )
            found[model] = (*found.get(model, ()), task)
        return found


def read_router(given: Iterable[str]) -> Router | None:
    """From TASK=MODEL and MODEL; None where nothing is given.

    Raises:
        ConfigError: a task is given twice, or a part of it is missing.
    """
    by_task, rest = dict[str, str](), list[str]()
    for text in given:
        task, equals, model = text.partition("=")
        if not equals:
            task, model = "", text
        if not model or (equals and not task):
            raise ConfigError(f"--router {text}: expected TASK=MODEL, or MODEL for all other tasks")
        if task in by_task or (not equals and rest):
            raise ConfigError(f"--router {text}: {task or 'the rest'} has a model already; give it one")
        if equals:
            by_task[task] = model
        else:
            rest.append(model)
    return Router(by_task, rest[0] if rest else None) if by_task or rest else None
