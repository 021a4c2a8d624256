"""``opd-ray train CONFIG``: run a recipe to its end, or on from its last checkpoint."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opd_ray.commands.options import Json, Override, Runs, RunSeed, overrides, require_local
from opd_ray.config import STUDENT, Config
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError, RunFolderError, Stopped
from opd_ray.recipes import load
from opd_ray.startup import Startup
from opd_ray.storage.run_folder import stopping_when_full

if TYPE_CHECKING:
    from opd_ray.report.live import Live
    from opd_ray.run import Run

__all__ = ["JOB", "ONE_REQUEST_S", "Handler", "interrupt", "interruptible", "run_training", "show", "signals", "train"]

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the driver of a job, and there alone."""
RAY_COPY = "working_dir_files"
"""The folder in which Ray unpacks a job's `--working-dir`."""
ONE_REQUEST_S = 0.5
"""SIGTERMs within it are one request: `timeout` sends it to its child, and to the child's whole group."""
ENDING_S = 2.5
"""So long before Ray's SIGKILL a job gives up its round: signals are seen every half second, deadlines every second."""


def train(
    config: Annotated[str, typer.Argument(help="A recipe's name or the path of a YAML file.")],
    override: Override = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; without one, start at round 0.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="With --resume: also where method, prompts or teachers are not those of before."),
    ] = False,
    seed: RunSeed = None,
    out: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """Distil specialists into one student (or run any other algorithm's recipe)."""
    loaded = load(config, overrides(override, seed))
    if force and not resume:
        raise ConfigError("--force belongs to --resume: a new run has nothing to differ from")
    result = run_training(loaded, out / loaded.name, resume=resume, force=force)
    show(result, out / loaded.name, as_json=json)


def run_training(config: Config, folder: Path, *, resume: bool, force: bool = False) -> dict[str, Any]:
    """Build, train, finish; where there are specialists to train first, all stages one after the other.

    Ctrl-C or SIGTERM ends the round, writes a checkpoint and stops; while no round is under way, at the second one, or
    shortly before `ray job stop` kills what is left, it stops at once.

    Raises:
        Stopped: before the end; the run can be resumed.
        RunFolderError: the run would not be found again.
    """
    require_local(folder)
    if RAY_COPY in folder.resolve().parts:
        raise RunFolderError(
            f"{folder} lies in Ray's own copy of your working directory, which Ray deletes when it likes; "
            "give --out a folder that stays, for instance --out /shared/runs"
        )
    if config.specialists:
        from opd_ray.commands.stages import run_stages  # it imports this module

        return run_stages(config, folder, resume=resume, force=force)
    startup = Startup()
    from opd_ray.build import build  # imports torch and diffusers, which `--help` does not need
    from opd_ray.report.live import Live

    live = Live(config.rounds, config.name, console=errors)
    # Stdout is the result's: Ray, for one, tells there of a worker that died.
    with (
        interruptible(),
        redirect_stdout(sys.stderr),
        stopping_when_full(folder),
        build(config, folder, live, resume=resume, force=force, startup=startup) as run,
    ):
        return _drive(run, live)


def _drive(run: "Run", live: "Live") -> dict[str, Any]:
    """The rounds and what comes after them; whatever ends them early is noted in the run folder."""
    from opd_ray.loop import train as loop

    live.begin(run.round)
    try:
        with stopping_when_full(run.folder):
            with signals(_asking(run, live)):
                loop(run)
            if run.stopping:
                raise Stopped(
                    f"stopped after the last of {run.rounds} rounds; --resume evaluates and writes the result"
                )
            return run.finish()
    finally:
        match sys.exception():
            case Stopped() | KeyboardInterrupt() as error:
                run.stop(str(error) or "interrupted")
            case Exception() as error:
                run.stop(f"{type(error).__name__}: {error}", "failed")


Handler = Callable[[int, FrameType | None], None]


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C or SIGTERM stops at once what is done here, resumably.

    Raises:
        Stopped: one of them came.
    """
    try:
        with signals(interrupt):
            yield
    except KeyboardInterrupt:
        raise Stopped("interrupted; go on from the last checkpoint with --resume") from None


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of signals that ends at once what is being done."""
    raise KeyboardInterrupt


def _asking(run: "Run", live: "Live") -> Handler:
    """The first signal asks the loop to stop after this round; the second stops at once."""
    asked = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if run.stopping and number == signal.SIGTERM and time.monotonic() - asked < ONE_REQUEST_S:
            return
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping, asked = True, time.monotonic()
        if number == signal.SIGTERM:
            run.stop_by = time.monotonic() + _patience_s()
        live.note("stopping after this round, with a checkpoint; once more stops at once")

    return stop


def _patience_s() -> float:
    """How long the round may still take after SIGTERM."""
    if JOB not in os.environ:
        return math.inf
    return float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) - ENDING_S


@contextmanager
def signals(handler: Handler) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to this handler for a while."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def show(result: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """The table, and where to look."""
    from opd_ray.report.table import result_table, stages_table, summary

    if as_json:
        console.print_json(data=result)
        return
    if "stages" in result:
        console.print(stages_table(result["stages"]))
        folder = folder / STUDENT
    if result["scores"]:
        console.print(result_table(result))
    console.print(summary(result))
    console.print(f"pictures and curves  {folder / 'report.html'}", soft_wrap=True)
    trained = next((name for name in ("lora", "transformer") if (folder / name).is_dir()), "unet")
    console.print(f"{trained.replace('lora', 'LoRA')} for diffusers".ljust(21) + f"{folder / trained}", soft_wrap=True)
