"""``opd-ray plan CONFIG``: what each role will need, and how to divide a cluster among the roles."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from opd_ray.commands.options import Override
from opd_ray.config import Config
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError
from opd_ray.recipes import load

if TYPE_CHECKING:
    from opd_ray.planning import Need
    from opd_ray.planning.outlook import Outlook
    from opd_ray.planning.rates import Rates

__all__ = ["plan"]

READS = (
    "Experience is read and not drawn, so there is nothing to divide: this is memory alone. Who waits for whom shows "
    "in `opd-ray status RUN` and in the run's report"
)
HOW = (
    "No rates are known, so this is memory alone. `opd-ray train` measures them: give --from-run RUN after a few "
    "rounds, or --rates FILE"
)


def plan(
    config: Annotated[str, typer.Argument(help="A recipe's name or the path of a YAML file.")],
    override: Override = None,
    units: Annotated[
        int,
        typer.Option("--gpus", "--workers", min=1, help="Cards to divide; worker slots where no role asks for one."),
    ] = 64,
    from_run: Annotated[Path | None, typer.Option(metavar="RUN", help="A run whose measured rates count.")] = None,
    rates: Annotated[Path | None, typer.Option(metavar="FILE", help="Rates in YAML or JSON.")] = None,
    write_rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the rates that were used, to be edited and read again.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the throughput over cluster sizes.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Estimate each role's memory from the model's configs, and divide a cluster by the speed that a run measured.

    No weight is loaded or downloaded.
    """
    from opd_ray.planning import check_memory, needs

    loaded = load(config, override or [])
    known = _rates(loaded, from_run, rates)
    needed = needs(loaded)
    found = _outlook(loaded, known, units) if known is not None else None
    if json:
        memory = [asdict(need) | {"total": need.total} for need in needed]
        console.print_json(data={"memory": memory, "split": found.data() if found else None})
    else:
        _print_memory(loaded, needed)
        if found is None:
            console.print(HOW if loaded.drawn else READS)
        else:
            _print_split(found)
    check_memory(loaded, needed)
    if write_rates is not None and known is not None:
        _write(write_rates, known.to_yaml(), "--write-rates")
    if out is not None and found is not None:
        _draw(found, loaded.name, out)


def _rates(config: Config, run: Path | None, file: Path | None) -> "Rates | None":
    """Of this configuration's batch; None where nobody measured any."""
    from opd_ray.planning.rates import Rates

    if run is not None and file is not None:
        raise ConfigError("--from-run and --rates both say how fast workers are; give one of them")
    if run is None and file is None:
        return None
    if not config.drawn:
        option = "--from-run" if run is not None else "--rates"
        raise ConfigError(
            f"{config.name} reads its experience and draws none: {option} has nothing to divide; leave it out"
        )
    found = Rates.from_run(run) if run is not None else Rates.read(file or Path())
    return found.for_config(config)


def _outlook(config: Config, rates: "Rates", units: int) -> "Outlook":
    from opd_ray.planning.outlook import outlook

    if config.cluster.runtime == "local":
        raise ConfigError("cluster.runtime local has one process, so there is nothing to divide; use runtime: ray")
    return outlook(config, rates, units)


def _print_memory(config: Config, needed: "Sequence[Need]") -> None:
    rows = [
        (
            need.role,
            str(need.workers),
            f"{need.gpu:g} gpu" if need.device == "cuda" else "cpu",
            *(f"{amount:.2f}" for amount in (need.weights, need.trained, need.working, need.total)),
        )
        for need in needed
    ]
    columns = ("role", "workers", "on", "weights", "trained", "at work", "total")
    table = _table("GB (1e9 bytes) of one worker, estimated", columns, rows)
    console.print(table if rows else f"family {config.model.family} does not say its shape: nothing to estimate")


def _print_split(found: "Outlook") -> None:
    split, unit = found.split, found.unit
    kind = "strictly on-policy" if found.staleness == 0 else f"staleness {found.staleness}"
    if unit != "GPU":
        console.print("No role asks for a gpu, so the number counts worker slots.")
    rows = [
        (role, str(count), f"{found.limits[role]:.3g}", _factor(found.one_more.get(role)))
        for role, count in split.workers.items()
    ]
    caption = f"the best split of {found.total} {unit}s: {split.units} in use, {kind}"
    console.print(_table(caption, ("role", "workers", "samples/s if never waiting", "one more gives"), rows))
    idle = found.total - split.units
    spare = f"; {idle} {unit}s have no use, since no round has more items to share out" if idle else ""
    console.print(
        f"predicted {split.samples_per_s:.3g} samples/s, {found.round_s:.3g} s a round, of which publishing takes "
        f"{found.publish_s:.2g} s; bottleneck: {split.bottleneck}{spare}",
        soft_wrap=True,
    )
    if found.ahead >= 1.05:
        console.print(
            f"cluster.max_staleness={found.staleness + 1} would give about {found.ahead:.2f}x", soft_wrap=True
        )
    sizes = [
        (
            str(size),
            f"{best.samples_per_s:.3g}",
            best.bottleneck,
            ", ".join(f"{r} {n}" for r, n in best.workers.items()),
        )
        for size, best in found.curve
    ]
    console.print(
        _table("predicted, with the best split of each size", (f"{unit}s", "samples/s", "bottleneck", "split"), sizes)
    )


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in {"role", "bottleneck", "split"} else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _draw(found: "Outlook", name: str, out: Path) -> None:
    from opd_ray.planning.outlook import picture

    if out.suffix != ".svg":
        raise ConfigError(f"--out {out}: the picture is SVG; give a name that ends in .svg")
    _write(out, picture(found, f"{name}: predicted throughput"), "--out")


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror}); choose another place") from None
    errors.print(f"wrote {path}")
