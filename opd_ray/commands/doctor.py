"""``opd-ray doctor``: what is installed, and what works here."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from opd_ray.commands.options import Json, Override, overrides
from opd_ray.console import console
from opd_ray.recipes import load

__all__ = ["doctor"]

STYLES = {"ok": None, "warning": "yellow", "problem": "bold red"}


def doctor(
    config: Annotated[str, typer.Argument(help="The recipe whose object store has to find room.")] = "demo",
    override: Override = None,
    clean: Annotated[
        bool,
        typer.Option("--clean", help="Only end and remove what runs left that were killed: Ray's processes, folders."),
    ] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Also start Ray with one worker, and end it: 10 to 30 s.")] = False,
    manifests: Annotated[
        Path | None,
        typer.Option(help="Also compare KubeRay manifests with the recipe's cluster: a YAML file, or - for stdin."),
    ] = None,
    json: Json = False,
) -> None:
    """Say in a line a check what was found and what to do; exit code 2 if there is a problem."""
    if clean:
        _clean(as_json=json)
        return
    from opd_ray.planning.doctor import findings

    records = []
    for check, finding in findings(load(config, overrides(override, None)), start_ray=ray, manifests=manifests):
        records.append({"check": check} | asdict(finding))
        if not json:
            advice = f" ({finding.advice})" if finding.advice else ""
            line = f"{finding.status:<7}  {check}: {finding.found}{advice}"
            console.print(line, style=STYLES[finding.status], soft_wrap=True)
    if json:
        console.print_json(data=records)
    if any(record["status"] == "problem" for record in records):
        raise typer.Exit(2)


def _clean(*, as_json: bool) -> None:
    from opd_ray.runtime.session import clean

    told = clean()
    if as_json:
        console.print_json(data=told)
        return
    for line in told or ["nothing is left of runs that were killed"]:
        console.print(line, soft_wrap=True)
