"""``opd-ray plan CONFIG``: what each role will need, before anything is loaded."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from opd_ray.commands.options import Override
from opd_ray.console import console
from opd_ray.recipes import load

__all__ = ["plan"]


def plan(
    config: Annotated[str, typer.Argument(help="A recipe's name or the path of a YAML file.")],
    override: Override = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Estimate the memory of each role's workers from the model's configs: no weight is loaded or downloaded."""
    from opd_ray.planning import check_memory, needs

    loaded = load(config, override or [])
    found = needs(loaded)
    if json:
        console.print_json(data=[asdict(need) | {"total": need.total} for need in found])
    else:
        table = Table(box=box.SIMPLE_HEAD, caption="GB (1e9 bytes) of one worker, estimated", caption_justify="left")
        table.add_column("role")
        for name in ("workers", "on", "weights", "trained", "at work", "total"):
            table.add_column(name, justify="right")
        for need in found:
            place = f"{need.gpu:g} gpu" if need.device == "cuda" else "cpu"
            amounts = (need.weights, need.trained, need.working, need.total)
            table.add_row(need.role, str(need.workers), place, *(f"{amount:.2f}" for amount in amounts))
        console.print(table if found else f"family {loaded.model.family} does not say its shape: nothing to estimate")
    check_memory(loaded, found)
