"""``opd-ray scale RUN ROLE=NUMBER...``: other numbers of workers while the run goes on."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from opd_ray.commands.options import require_local
from opd_ray.console import console
from opd_ray.errors import ConfigError

__all__ = ["parse_targets", "scale"]


def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a run that is under way, for instance runs/demo.")],
    targets: Annotated[
        list[str], typer.Argument(help="role=number: rollout=2, reward=1, teacher.text=3, or text=3 for short.")
    ],
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the run's answer.")] = 30.0,
) -> None:
    """Ask a run for other numbers of workers; the student stays the same, bit for bit.

    New workers get work once their weights are proven; surplus ones finish what they hold.
    """
    from opd_ray.storage.control import ask

    require_local(run, "RUN")
    answer = ask(run, parse_targets(targets), timeout)
    if not answer.ok:
        raise ConfigError(answer.text)
    console.print(answer.text, soft_wrap=True)


def parse_targets(given: Sequence[str]) -> dict[str, int]:
    """Numbers of workers by name.

    Raises:
        ConfigError: one of them is not name=number, or a name comes twice.
    """
    targets: dict[str, int] = {}
    for text in given:
        name, _, number = text.partition("=")
        if not name or not re.fullmatch(r"-?[0-9]{1,9}", number):
            raise ConfigError(f"{text}: expected role=number, for instance rollout=2 or teacher.text=3")
        if name in targets:
            raise ConfigError(f"{text}: {name} was given before; give it once")
        targets[name] = int(number)
    return targets
