"""``opd-ray report RUN``: write the run's page again."""

from pathlib import Path
from typing import Annotated

import typer

from opd_ray.commands.options import require_local
from opd_ray.console import console
from opd_ray.errors import RunFolderError

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, for instance runs/demo.")],
    grid: Annotated[Path | None, typer.Option(help="Also write the picture grid as one PNG, here.")] = None,
) -> None:
    """Write report.html from what the run folder holds; an unfinished run says what is missing."""
    from opd_ray.report.grid import write_grid
    from opd_ray.report.html import write_report

    require_local(run, "RUN")
    if not (run / "run.json").is_file():
        raise RunFolderError(f"{run}: not a run folder (no run.json); run folders are runs/<name>")
    try:
        written = [write_report(run)]
        if grid is not None:
            written.append(write_grid(run, grid))
    except OSError as error:
        raise RunFolderError(f"{error.filename or run}: cannot be written ({error.strerror})") from None
    for path in written:
        console.print(str(path), soft_wrap=True)
