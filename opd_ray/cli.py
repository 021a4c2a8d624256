"""The command line. Exit codes: 0 done, 2 the user's error, 3 stopped and resumable, 1 failed."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from opd_ray import __version__
from opd_ray.commands.accuracy import accuracy
from opd_ray.commands.compare import compare
from opd_ray.commands.config import config
from opd_ray.commands.demo import demo
from opd_ray.commands.doctor import doctor
from opd_ray.commands.evaluate import evaluate
from opd_ray.commands.merge import merge
from opd_ray.commands.pairs import pairs
from opd_ray.commands.plan import plan
from opd_ray.commands.record import record
from opd_ray.commands.report import report
from opd_ray.commands.sample import sample
from opd_ray.commands.scale import scale
from opd_ray.commands.score import score
from opd_ray.commands.status import status
from opd_ray.commands.train import train
from opd_ray.console import console, errors, results_alone
from opd_ray.errors import OpdRayError

__all__ = ["app", "main"]

app = typer.Typer(
    help="On-policy distillation of specialist text-to-image models into one student, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show(wanted: bool) -> None:
    if wanted:
        console.print(f"opd-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _alone(verb: Callable[..., None]) -> Callable[..., None]:
    """The same command, with stdout for its result alone."""

    @wraps(verb)
    def run(**options: Any) -> None:
        with results_alone():
            verb(**options)

    return run


for verb in (
    *(demo, train, sample, evaluate, score, compare, pairs, accuracy, record, merge),
    *(scale, status, config, plan, report, doctor),
):
    app.command()(_alone(verb))


def main() -> None:
    """Run a command; a user's error is one line without a traceback."""
    try:
        app(prog_name="opd-ray")
    except OpdRayError as error:
        if error.exit_code == 1:
            raise
        label, style = ("stopped", None) if error.exit_code == 3 else ("error", "bold red")
        text = " ".join(str(error).splitlines())
        errors.print(f"{label}: {text}", style=style, soft_wrap=True)
        sys.exit(error.exit_code)
