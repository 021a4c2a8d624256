"""Makes the whole world from nothing, stage by stage, and resumes where it was stopped."""

import hashlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from opd_ray.world.drawing import STEPS
from opd_ray.world.settings import Settings
from opd_ray.world.stages import Stage, Workplace, stages
from opd_ray.world.unet_stages import unet_stages


def build(out: Path, settings: Settings, console: Console, force: bool = False) -> dict[str, Any]:
    """Run every stage that is not done yet in ``out`` and write ``out/record.json``.

    A stage is done when its record names the same settings, its own and those of all stages before
    it. ``force`` forgets what was done before, and what was begun.
    """
    if force:
        shutil.rmtree(out / "work", ignore_errors=True)
    (out / "work").mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    key = ""
    for stage in [*stages(settings), *unet_stages()]:
        key = _key(key, stage, settings)
        path = out / "work" / f"{stage.name.replace(' ', '-')}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("key") == key:
            console.print(f"{stage.name}: done before, {record['seconds']:.0f} s")
        else:
            record = _run(stage, out, settings, key, console)
            record["key"] = key
            path.write_text(json.dumps(record, indent=1))
        done.append(record)
    record = _record(settings, done)
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _key(before: str, stage: Stage, settings: Settings) -> str:
    text = json.dumps([before, stage.name, stage.depends(settings)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(stage: Stage, out: Path, settings: Settings, key: str, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(stage.name, total=stage.length(settings), rate="", note="")
        place = Workplace(out, settings, key, _Teller(progress, bar, console, started))
        result = stage.run(place)
    seconds = time.monotonic() - started
    return {"name": stage.name, "seconds": round(seconds, 1), "result": result}


class _Teller:
    """Moves the bar; where there is no terminal, says a line about every 20 seconds instead."""

    def __init__(self, progress: Progress, bar: TaskID, console: Console, started: float) -> None:
        self._progress, self._bar, self._console = progress, bar, console
        self._started, self._told, self._count = started, started, 0

    def __call__(self, count: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        self._count += count
        rate = f"{self._count / max(now - self._started, 1e-6):.1f}/s"
        note = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._progress.update(self._bar, advance=count, rate=rate, note=note)
        if not self._console.is_terminal and now - self._told > 20:
            self._told = now
            task = self._progress.tasks[0]
            left = task.time_remaining
            self._console.print(
                f"{task.description}: {self._count}/{task.total:.0f}, {rate}, "
                f"{'?' if left is None else round(left)} s left, {note}"
            )


def _record(settings: Settings, done: list[dict[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "settings": asdict(settings),
        "sampling_steps": STEPS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": {one["name"]: one["seconds"] for one in done},
        "seconds_together": round(sum(one["seconds"] for one in done), 1),
    }
    for one in done:
        record |= one["result"]
    return record
