"""``opd-ray train CONFIG``: run a recipe to its end, or on from its last checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from opd_ray.config import Config
from opd_ray.console import console
from opd_ray.errors import Stopped
from opd_ray.recipes import load

__all__ = ["run_training", "train"]


def train(
    config: Annotated[str, typer.Argument(help="A recipe's name or the path of a YAML file.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--override", "-o", help="key=value, for instance -o rounds=6 -o cluster.rollout.workers=2"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; without one, start at round 0.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Distil specialists into one student (or run any other algorithm's recipe)."""
    loaded = load(config, override or [])
    result = run_training(loaded, out / loaded.name, resume=resume)
    show(result, out / loaded.name, as_json=json)


def run_training(config: Config, folder: Path, *, resume: bool) -> dict[str, Any]:
    """Build, train, finish. Ctrl-C or SIGTERM ends the round, writes a checkpoint and stops with exit code 3."""
    from opd_ray.build import build  # imports torch and diffusers, which `--help` does not need
    from opd_ray.loop import train as loop
    from opd_ray.report.live import Live

    with Live(config.rounds, config.name, console=console) as live, build(config, folder, live, resume=resume) as run:
        live.begin(run.round)
        with _graceful(run, live):
            try:
                loop(run)
            except (Stopped, KeyboardInterrupt) as error:
                run.stop(str(error) or "interrupted")
                raise
            return run.finish()


@contextmanager
def _graceful(run: Any, live: Any) -> Iterator[None]:
    """The first signal asks the loop to stop after this round; the second stops at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True
        live.note("stopping after this round, with a checkpoint; once more stops at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(result: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """The table, and where to look."""
    from opd_ray.report.table import result_table, summary

    if as_json:
        console.print_json(data=result)
        return
    if result["scores"]:
        console.print(result_table(result))
    console.print(summary(result))
    console.print(f"pictures and curves  {folder / 'report.html'}", soft_wrap=True, markup=False)
    console.print(f"LoRA for diffusers   {folder / 'lora'}", soft_wrap=True, markup=False)
