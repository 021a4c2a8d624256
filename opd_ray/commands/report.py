"""``opd-ray report RUN``: write the run's page again."""

from pathlib import Path
from typing import Annotated

import typer

from opd_ray.console import console
from opd_ray.errors import RunFolderError

__all__ = ["report"]


def report(run: Annotated[Path, typer.Argument(help="A run folder, for instance runs/demo.")]) -> None:
    """Write report.html from what the run folder holds; an unfinished run says what is missing."""
    from opd_ray.report.html import write_report

    if not (run / "run.json").is_file():
        raise RunFolderError(f"{run}: not a run folder (no run.json); run folders are runs/<name>")
    try:
        page = write_report(run)
    except OSError as error:
        raise RunFolderError(f"{run}: report.html cannot be written ({error.strerror})") from None
    console.print(str(page), soft_wrap=True)
