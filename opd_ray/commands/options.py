"""What several verbs share: their options, and where they write."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from opd_ray.errors import RunFolderError

__all__ = ["Json", "Override", "RunSeed", "Runs", "Seed", "Threads", "overrides", "require_folder", "require_local"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--override", "-o", help="key=value, for instance -o rounds=6 -o cluster.rollout.workers=2"),
]
Runs = Annotated[Path, typer.Option(help="Where run folders go.")]
RunSeed = Annotated[int | None, typer.Option(min=0, help="Short for -o seed=N.")]
Threads = Annotated[
    int, typer.Option(min=1, help="Torch threads on the CPU; 1 draws the very bits that a run's workers draw.")
]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same prompts and first noises.")]


def overrides(given: list[str] | None, seed: int | None) -> list[str]:
    """The overrides of a run, ``--seed`` among them."""
    return [*(given or []), *([] if seed is None else [f"seed={seed}"])]


def require_local(path: Path, what: str = "--out") -> None:
    """Refuse what is no path of a file system; ``what`` begins the message.

    Raises:
        RunFolderError: it is an address, for instance ``s3://bucket/runs``.
    """
    if path.parts and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", path.parts[0]):
        raise RunFolderError(
            f"{what}: {path.parts[0]}// is an address, and a run needs a folder that it can lock and rename in; mount "
            "it as a file system, or train into a local folder and copy it afterwards"
        )


def require_folder(path: Path) -> None:
    """Make an output folder, before any work whose outcome would be lost without it.

    Raises:
        RunFolderError: it cannot be made or written.
    """
    require_local(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out: {path} cannot be made ({error.strerror}); choose another place") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunFolderError(f"--out: {path} cannot be written; choose another place")
