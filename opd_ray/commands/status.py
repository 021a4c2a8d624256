"""``opd-ray status RUN``: how a run stands, from its folder alone."""

import contextlib
import itertools
import json as json_format
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from opd_ray.commands.options import Json, require_local
from opd_ray.config import STUDENT
from opd_ray.console import console
from opd_ray.errors import RunFolderError
from opd_ray.storage.run_folder import STAGES, read_json

__all__ = ["Standing", "status"]

EVERY_S = 1.0
PACE_ROUNDS = 20
GO_ON = "go on with opd-ray train ... --resume"
TAIL_BYTES = 1 << 17
"""Of metrics.jsonl: the last rows are enough, however long the run is."""


def status(
    run: Annotated[Path, typer.Argument(help="A run folder, for instance runs/demo, or that of a job of stages.")],
    json: Json = False,
    watch: Annotated[
        bool | None,
        typer.Option("--watch/--once", help="Show it anew each second until Ctrl-C; the default on a terminal."),
    ] = None,
) -> None:
    """Show how a run stands: its round and pace, and what the workers of each role do."""
    require_local(run, "RUN")
    stages, to_come = _stages(run)
    if json:
        found = {stage.name: Standing.read(stage).data() for stage in stages}
        console.print_json(data=found or Standing.read(run).data())
    elif console.is_terminal if watch is None else watch:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(run)
    else:
        for one in stages or [run]:
            console.print(Standing.read(one).show(console), soft_wrap=True)
        for text in to_come:
            console.print(text)


def _stages(folder: Path) -> tuple[list[Path], list[Text]]:
    """The runs that a job of several stages has begun, and a line on each of the others; neither of another folder."""
    names = read_json(folder / STAGES)["stages"] if (folder / STAGES).is_file() else ()
    begun = [name for name in names if (folder / name / "run.json").is_file()]
    return [folder / name for name in begun], [Text(f"{name}: not begun") for name in names if name not in begun]


@dataclass(frozen=True, slots=True)
class Standing:
    """A run's heartbeat, and what follows from it at this moment."""

    folder: Path
    beat: Mapping[str, Any]
    age_s: float
    """Of the heartbeat."""
    pace_s: float | None
    """Seconds a round, from end to end of the last ones; None before there are two."""

    @classmethod
    def read(cls, run: Path) -> "Standing":
        """Read it.

        Raises:
            RunFolderError: it is no run's folder, or the run has not begun to train.
        """
        from opd_ray.storage.control import heartbeat

        beat = heartbeat(run)
        return cls(run, beat, max(time.time() - beat["time"], 0.0), _pace(run / "metrics.jsonl"))

    @property
    def running(self) -> bool:
        """Whether its driver says so, however long ago."""
        return bool(self.beat["status"] == "running")

    def data(self) -> dict[str, Any]:
        """For scripts: ``status.json`` with ``heartbeat_age`` and ``seconds_per_round``."""
        return {**self.beat, "heartbeat_age": round(self.age_s, 1), "seconds_per_round": self.pace_s}

    def head(self) -> Iterator[Text]:
        """What stands above the roles, a line each."""
        from opd_ray.report.run_folder import mapping, numbers
        from opd_ray.report.wording import duration
        from opd_ray.storage.control import HEARTBEAT_S

        known = numbers(self.beat)
        done, rounds = int(known.get("round", 0)), int(known.get("rounds", 0))
        parts = [f"{self.folder.resolve().name}: {_line(self.beat['status'])}", f"{done} of {rounds} rounds done"]
        if self.pace_s is not None:
            parts.append(f"{duration(self.pace_s)} a round")
            if self.running:
                parts.append(f"{duration((rounds - done) * self.pace_s)} left")
        yield Text(", ".join(parts), style="bold")
        if not self.running:
            advice = "" if self.beat["status"] == "done" else f"; {GO_ON}"
            yield Text(f"ended {duration(self.age_s)} ago{advice}", style="dim")
            return
        if self.age_s > HEARTBEAT_S:
            advice = f"the driver is gone or hangs; {GO_ON}"
            yield Text(f"no heartbeat for {duration(self.age_s)}: {advice}", style="bold red")
        else:
            yield Text(f"heartbeat {duration(self.age_s)} ago, attempt {self.beat['attempt']}", style="dim")
        waiting = mapping(self.beat.get("waiting"))
        if waiting:
            since = numbers(waiting).get("since")
            lasted = "" if since is None else f" since {duration(max(known['time'] - since, 0.0))}"
            why = f": {_line(waiting['why'])}" if waiting.get("why") else ""
            yield Text(f"waiting for {_line(waiting.get('for'))}{lasted}{why}", style="yellow")
        if self.beat.get("phase"):
            yield Text(_line(self.beat["phase"]))

    def roles(self) -> list[Mapping[str, Any]]:
        """What the driver says of each role."""
        from opd_ray.report.run_folder import mapping

        rows = self.beat.get("roles")
        return [mapping(row) for row in rows] if self.running and isinstance(rows, list) else []

    def show(self, screen: Console) -> RenderableType:
        """A table where it fits the screen, otherwise a line for each role, which wraps."""
        roles = self.roles()
        head: list[RenderableType] = list(self.head())
        if not roles:
            return Group(*head)
        table = _table(roles)
        # Within the screen's own limit, a table that is too wide measures as wide as the screen.
        unlimited = screen.options.update(width=10_000)
        if Measurement.get(screen, unlimited, table).maximum <= screen.width:
            return Group(*head, table)
        return Group(*head, *map(_sentence, roles))


COLUMNS = {
    "wanted": "wanted",
    "starting": "starting",
    "healthy": "healthy",
    "suspect": "suspect",
    "busy": "busy",
    "queue": "queue",
    "rate": "a minute",
    "weights": "weights",
    "heartbeat_age": "heartbeat",
    "memory_mb": "memory",
}


def _cell(row: Mapping[str, Any], key: str) -> str:
    """One value as a person reads it."""
    from opd_ray.report.wording import MISSING, duration, number, percent

    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else _line(value)
    match key:
        case "busy":
            return percent(value)
        case "rate":
            return number(value)
        case "heartbeat_age":
            return duration(value)
        case "memory_mb":
            return f"{value / 1000:.1f} GB"
    return f"{value:.0f}"


def _table(roles: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("role", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in roles:
        style = "yellow" if row.get("suspect") or row.get("starting") else ""
        table.add_row(Text(_line(row.get("role"))), *(Text(_cell(row, key)) for key in COLUMNS), style=style)
    return table


def _sentence(row: Mapping[str, Any]) -> Text:
    """`teacher.text: 1 of 3 healthy, 2 starting, busy 40 %, queue 3, ...`; what is unknown is left out."""
    parts = [f"{_cell(row, 'healthy')} of {_cell(row, 'wanted')} healthy"]
    parts += [f"{_cell(row, key)} {key}" for key in ("starting", "suspect", "stale", "draining") if row.get(key)]
    for key in ("busy", "queue", "rate", "weights", "heartbeat_age", "memory_mb"):
        if row.get(key) is not None:
            value, title = _cell(row, key), COLUMNS[key]
            parts.append(f"{value} {title}" if key == "rate" else f"{title} {value}")
    return Text(f"{_line(row.get('role'))}: {', '.join(parts)}")


def _line(value: object) -> str:
    """Text of a file, as one line."""
    return " ".join(str(value).split())


def _pace(path: Path) -> float | None:
    """The median, so that the gap before a resumed round does not count."""
    times = []
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
            lines = file.read().splitlines()[-PACE_ROUNDS - 1 :]
    except OSError:
        return None
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short
            times.append(float(json_format.loads(line)["time"]))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return round(statistics.median(gaps), 3) if gaps else None


def _watch(run: Path) -> None:
    """Until Ctrl-C, or the end of the run or the job; what is just starting is waited for."""
    if not (run / "run.json").is_file() and not (run / STAGES).is_file():
        Standing.read(run)  # refuses it
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while True:
            stages, to_come = _stages(run)
            found = [_look(one) for one in stages or [run]]
            shown = Group(*(text for _, text in found), *to_come)
            if live is not None:
                live.update(shown, refresh=True)
            else:
                console.print(shown, soft_wrap=True)
            if _ended(run, [standing for standing, _ in found]):
                return
            time.sleep(EVERY_S)


def _ended(run: Path, found: Sequence[Standing | None]) -> bool:
    """Whether nothing more comes: of a job, its last stage has ended, or an earlier one before its time."""
    if any(standing is None or standing.running for standing in found):
        return False
    whole = not (run / STAGES).is_file() or (run / STUDENT / "run.json").is_file()
    return whole or any(standing is not None and standing.beat["status"] != "done" for standing in found)


def _look(run: Path) -> tuple[Standing | None, RenderableType]:
    try:
        standing = Standing.read(run)
    except RunFolderError as error:
        return None, Text(str(error))
    return standing, standing.show(console)
