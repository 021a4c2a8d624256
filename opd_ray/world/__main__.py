"""`python -m opd_ray.world build` and `show`."""

import argparse
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from opd_ray.errors import Stopped
from opd_ray.world import TASKS
from opd_ray.world.build import build
from opd_ray.world.settings import Settings
from opd_ray.world.show import write_sheets


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m opd_ray.world", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("build", help="make weights, prompts and record from nothing")
    making.add_argument("--out", type=Path, default=Path("world-build"))
    making.add_argument("--minutes-scale", type=float, default=1.0, metavar="X")
    making.add_argument("--force", action="store_true", help="run finished stages again")
    making.add_argument("--threads", type=int, default=2)
    showing = verbs.add_parser("show", help="write PNG sheets of pictures, for eyes")
    showing.add_argument("--out", type=Path, default=Path("world-sheets"))
    showing.add_argument("--world", type=Path, help="a build's folder; the shipped world if absent")
    arguments = parser.parse_args()
    console = Console()
    if arguments.verb == "show":
        for path in write_sheets(arguments.out, arguments.world):
            console.print(str(path))
        return
    torch.set_num_threads(arguments.threads)
    settings = Settings()
    if arguments.minutes_scale != 1.0:
        settings = settings.scaled(arguments.minutes_scale)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what a stage has running is ended with it
    try:
        record = build(arguments.out, settings, console, force=arguments.force)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    except Stopped as error:
        sys.exit(f"stopped: {error}")
    table = Table("held-out prompts", *TASKS, "guidance", title="scores by model and task")
    for name, row in record["scores"]["models"].items():
        cells = (f"{row[task][task]:.3f}" for task in TASKS)
        table.add_row(name, *cells, str(row["guidance"]))
    console.print(table)


if __name__ == "__main__":
    main()
