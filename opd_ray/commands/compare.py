"""``opd-ray compare PROTOCOL``: train, draw and score every arm of a protocol, and say which hypotheses hold."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opd_ray.commands.options import Json, require_folder
from opd_ray.commands.train import interrupt, signals
from opd_ray.console import console, errors
from opd_ray.errors import DiskFullError, RunFolderError, Stopped, UserError

if TYPE_CHECKING:
    from opd_ray.comparison.nodes import Node, Place
    from opd_ray.comparison.protocol import Protocol
    from opd_ray.comparison.results import Results

__all__ = ["compare"]

ABOUT = "protocol.json"
TEXT = "protocol.yaml"
"""Of a comparison's folder: the protocol that it was begun with."""


def compare(
    protocol: Annotated[Path, typer.Argument(help="A protocol: arms, budgets, seeds, prompts, hypotheses.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of all of it; run it again to go on.", show_default="runs/<name>")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Arms that are trained at a time, a core each.", show_default="all cores")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few rounds of one seed, to see that all of it runs; no findings.")
    ] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Only write the tables of what is there.")] = False,
    json: Json = False,
) -> None:
    """Carry a protocol out, and write comparison.md, comparison.json and pictures."""
    from opd_ray.comparison.nodes import Place, plan
    from opd_ray.comparison.protocol import read_protocol
    from opd_ray.storage.run_folder import locked, read_json, write_atomic, write_json_atomic

    written, sha256 = read_protocol(protocol)
    chosen = written.shortened() if quick else written
    place = Place((out or Path("runs") / (f"{chosen.name}_quick" if quick else chosen.name)).resolve())
    about = {"sha256": sha256, "quick": quick}
    known = place.out / ABOUT
    if known.is_file():
        _check_same(place, about)
    elif tables or (place.out.exists() and any(not file.name.startswith(".") for file in place.out.iterdir())):
        raise RunFolderError(f"{place.out} holds no comparison; choose another --out")
    if not tables:
        from opd_ray.comparison.checks import check  # imports torch

        check(written, place, protocol)
    require_folder(place.out)
    nodes = plan(chosen)
    failed = dict[str, str]()
    with nullcontext() if tables else locked(place.out, timeout_s=1.0), _stopping_when_full(place):
        if not known.is_file():
            write_atomic(place.out / TEXT, protocol.read_bytes())
            write_json_atomic(known, about)
        try:
            if not tables:
                _copy_prompts(chosen, place)
                failed = _carry_out(chosen, nodes, place, jobs or os.cpu_count() or 1)
        except KeyboardInterrupt:
            results = _write(chosen, sha256, place, quick)
            raise Stopped(f"{results.done} of {results.total} are done; run it again to go on") from None
        results = _write(chosen, sha256, place, quick)
    if json:
        console.print_json(data=read_json(place.out / "comparison.json"))
    else:
        for verdict in () if quick else results.verdicts:
            console.print(f"{verdict.name}  {verdict.verdict:10} {verdict.says}", soft_wrap=True, markup=False)
        console.print(f"tables and pictures  {place.out / 'comparison.md'}", soft_wrap=True, markup=False)
    if failed:
        key, why = next((key, why) for key, why in failed.items() if not why.startswith("needs "))
        raise UserError(f"{len(failed)} of {len(nodes)} could not be done; first {key}: {why}")


@contextmanager
def _stopping_when_full(place: "Place") -> Iterator[None]:
    """A full disk stops everything, with what has to be done, whether it was met here or in a worker."""
    from opd_ray.comparison.workers import in_one_line
    from opd_ray.storage.run_folder import stopping_when_full

    try:
        with stopping_when_full(place.out):
            yield
    except DiskFullError as error:
        raise DiskFullError(in_one_line(error)) from None


def _check_same(place: "Place", about: dict[str, Any]) -> None:
    """Refuse to go on in a folder with another protocol than it was begun with.

    Raises:
        RunFolderError: says where the one that it was begun with is.
    """
    from opd_ray.storage.run_folder import read_json

    known = read_json(place.out / ABOUT)
    if known == about:
        return
    if known.get("sha256") == about["sha256"]:
        begun = "with" if known.get("quick") else "without"
        raise RunFolderError(f"{place.out} was begun {begun} --quick; go on so, or choose another --out")
    kept = place.out / TEXT
    if kept.is_file():
        raise RunFolderError(
            f"{place.out} was begun with another protocol, which is in {kept}; go on with that one, or choose another "
            "--out"
        )
    raise RunFolderError(f"{place.out} was begun with another protocol; put it back, or choose another --out")


def _copy_prompts(protocol: "Protocol", place: "Place") -> None:
    from opd_ray.comparison.protocol import prompts_in
    from opd_ray.storage.run_folder import write_atomic

    for task, path in protocol.copies.items():
        place.prompts.mkdir(exist_ok=True)
        (prompts,) = prompts_in(path, None, "stop").values()
        write_atomic(place.prompts / f"{task}.txt", "".join(f"{prompt.text}\n" for prompt in prompts).encode())


def _write(protocol: "Protocol", sha256: str, place: "Place", quick: bool) -> "Results":
    from opd_ray.comparison.pictures import write_pictures
    from opd_ray.comparison.results import gather
    from opd_ray.comparison.tables import write_tables

    results = gather(protocol, sha256, place, quick=quick)
    write_tables(results, place.out, write_pictures(results, place.out))
    return results


def _carry_out(protocol: "Protocol", nodes: "list[Node]", place: "Place", jobs: int) -> dict[str, str]:
    """All that is left, with progress; returns what failed, and why."""
    from opd_ray.comparison.nodes import weight_of
    from opd_ray.comparison.workers import Workers

    weights = {node.key: weight_of(protocol, node) for node in nodes}
    done = {node.key for node in nodes if place.done(node)}
    columns = (
        *(TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()),
        *(TextColumn("{task.fields[pieces]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        TextColumn("{task.fields[now]}"),
    )
    busy, finished = dict[str, None](), len(done)
    with Progress(*columns, console=errors) as progress:
        bar = progress.add_task("comparing", total=sum(weights.values()), pieces="", now="")
        before = sum(weights[key] for key in done)
        progress.update(bar, completed=before, pieces=f"{finished}/{len(nodes)}")

        def told(node: "Node", what: str, seconds: float) -> None:
            nonlocal finished
            if what == "begun":
                busy[node.key] = None
            else:
                busy.pop(node.key, None)
                finished += 1
                progress.update(bar, advance=weights[node.key])
                left = progress.tasks[0].time_remaining
                told_left = "" if left is None else f", {left / 60:.0f} min left"
                ended = "" if what == "done" else f": {what}"
                text = (
                    f"{finished}/{len(nodes)} {node.key} {seconds:.0f} s{told_left if not errors.is_terminal else ''}"
                )
                if ended or not errors.is_terminal:
                    progress.console.print(f"{text}{ended}", soft_wrap=True, markup=False, highlight=False)
            progress.update(bar, pieces=f"{finished}/{len(nodes)}", now=", ".join(busy))

        workers = Workers(protocol, place, jobs, told)
        with signals(interrupt):
            workers.carry_out(nodes, done)
    return workers.failed
