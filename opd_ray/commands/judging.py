"""What `evaluate --prompts` and `score` share: rewards and workers by option, and what they leave behind."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opd_ray.commands.options import require_folder
from opd_ray.console import console, errors
from opd_ray.errors import ConfigError, RunFolderError, Stopped
from opd_ray.report.wording import MISSING, Write, alike, count, span

if TYPE_CHECKING:
    from opd_ray.config import Config
    from opd_ray.evaluation.parts import Part, Results
    from opd_ray.types import Prompt

__all__ = [
    "Cluster",
    "ClusterKeys",
    "RewardNames",
    "carry_out",
    "config_of",
    "folder_for",
    "table_of",
    "versions_of",
]

JUDGES = "rewards.json"
"""How each reward proved itself before anything counted, the hashes of its weights, and its packages."""

RewardNames = Annotated[
    list[str] | None,
    typer.Option(
        help="Who scores: names with commas between, or a mapping of names and arguments as in a recipe, or its file."
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(help="Where it runs: a file of configs/cluster by its name, or a path; in this process otherwise."),
]
ClusterKeys = Annotated[
    list[str] | None,
    typer.Option("--override", "-o", help="cluster.key=value, for instance -o cluster.rollout.workers=2"),
]


def config_of(rewards: Sequence[str], cluster: str | None, keys: Sequence[str], threads: int) -> "Config":
    """A run of which only rewards and cluster are used.

    Raises:
        ConfigError: a reward or a placement that cannot be.
    """
    from opd_ray.config import parse
    from opd_ray.recipes import cluster_file, override
    from opd_ray.rewards.base import check_rewards

    chosen = _rewards(rewards)
    data: dict[str, Any] = {"cluster": cluster_file(cluster) if cluster is not None else _here(threads)}
    for unused in ("teachers", "learner", "share_base"):
        data["cluster"].pop(unused, None)
    if isinstance(placed := data["cluster"].get("rewards"), dict):  # a file may be for other rewards, too
        data["cluster"]["rewards"] = {name: own for name, own in placed.items() if name in {"default", *chosen}}
    for key in keys:
        if not key.startswith("cluster."):
            raise ConfigError(f"-o {key}: expected a key of cluster, for instance cluster.rollout.workers=2")
        override(data, key)
    data |= {"name": "evaluation", "rounds": 1, "model": {"path": "world"}, "algorithm": {"name": "ddpo"}}
    data |= {"rewards": chosen, "prompts": {"train": "-"}}
    config = parse(data, "-o" if cluster is None else f"--cluster {cluster}")
    check_rewards(config.rewards, {}, (), _elsewhere(config))
    return config


def _here(threads: int) -> dict[str, Any]:
    """This process, on its card where it has one."""
    import torch

    own = {"threads": threads, "resources": {"cpu": 1, "gpu": int(torch.cuda.is_available())}}
    return {"runtime": "local", "rollout": {**own}, "rewards": {"default": {**own}}}


def _elsewhere(config: "Config") -> list[str]:
    """Rewards whose packages are in an environment of their own."""
    return [name for name in config.rewards if config.cluster.of_reward(name).runtime_env]


def _rewards(given: Sequence[str]) -> dict[str, Any]:
    """By name, with their arguments."""
    found: dict[str, Any] = {}
    for text in given:
        path = Path(text)
        if path.suffix in {".yaml", ".yml", ".json"}:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--rewards {path}: cannot be read ({error})") from None
        elif not text.lstrip().startswith("{"):
            found |= {name.strip(): {} for name in text.split(",") if name.strip()}
            continue
        found |= _mapping(text, str(path))
    if not found:
        raise ConfigError("--rewards names no reward; for instance pickscore,clipscore or package.module:attr")
    return found


def _mapping(text: str, what: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--rewards {what}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(data, dict) and isinstance(data.get("rewards"), dict):  # a recipe's section, or a whole recipe
        data = data["rewards"]
    if not isinstance(data, dict) or not all(isinstance(args, dict | None) for args in data.values()):
        raise ConfigError(f"--rewards {what}: expected a mapping of names to arguments, as in {{pickscore: {{}}}}")
    return {str(name): args or {} for name, args in data.items()}


def versions_of(config: "Config") -> dict[str, Any]:
    """Of everything that draws and scores."""
    from opd_ray.evaluation.versions import of_rewards
    from opd_ray.rewards.versions import packages

    environments = {name: config.cluster.of_reward(name).runtime_env for name in config.rewards}
    return {"packages": packages(), "rewards": of_rewards(config.rewards, environments)}


def carry_out(
    config: "Config",
    results: "Results",
    parts: "Sequence[Part]",
    make: Callable[[], Any],
    prompts: "Sequence[Prompt]",
    told: dict[str, Any],
    *,
    json: bool,
) -> None:
    """Do the parts that are not there yet, write what is made of all, and tell it.

    Args:
        config: of ``config_of``.
        results: the folder.
        parts: all of them.
        make: the host of the workers that make pictures.
        prompts: a few, for rewards that are proven by their answering at all.
        told: what was asked; the summary is added to it.
        json: print this, and nothing else.
    """
    from opd_ray.evaluation.summary import summary
    from opd_ray.evaluation.tables import markdown
    from opd_ray.storage.run_folder import read_json, write_atomic, write_json_atomic

    left = results.left(parts)
    if left:
        _work(config, results, parts, left, make, prompts, quiet=json)
    for name, about in read_json(results.folder / JUDGES).items():
        told["versions"]["rewards"][name] |= about
    rows = results.finish(parts)
    told |= {"pictures": len(rows), **summary(rows, results.rewards)}
    write_json_atomic(results.folder / "summary.json", told)
    beside = os.path.relpath(Path(told.get("images", results.folder)).resolve(), results.folder)
    write_atomic(results.folder / "summary.md", markdown(told, rows, beside).encode())
    if json:
        console.print_json(data=told)
        return
    by_model = told["scores"].items()
    console.print(
        table_of(
            {
                model: {f"{task} {reward}": one for task, by in tasks.items() for reward, one in by.items()}
                for model, tasks in by_model
            }
        )
    )
    failed = sum(bool(results.errors(row)) for row in rows)
    if failed:
        console.print(f"{count(failed, 'picture')} left out of a mean (summary.md says why); run it again to try again")
    console.print(
        f"{count(len(rows), 'picture')}: {results.folder}/images.parquet, summary.json, summary.md", soft_wrap=True
    )


def _work(
    config: "Config",
    results: "Results",
    parts: "Sequence[Part]",
    left: "Sequence[Part]",
    make: Callable[[], Any],
    prompts: "Sequence[Prompt]",
    *,
    quiet: bool,
) -> None:
    """Through the workers, with progress."""
    from opd_ray.build import make_backend
    from opd_ray.evaluation.workers import workers
    from opd_ray.runtime.session import clean

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total = sum(len(part.prompts) for part in parts)

    def done() -> int:
        return sum(map(len, results.rows.values()))

    def tell(text: str) -> None:
        if not quiet:
            errors.print(text, soft_wrap=True)

    with Progress(*columns, console=errors, disable=quiet or not errors.is_terminal, transient=True) as progress:
        bar = progress.add_task("pictures", total=total, completed=done())

        def write(part: "Part", found: Any) -> None:
            results.write(part, found)
            progress.update(bar, completed=done())

        try:
            for text in clean() if config.cluster.runtime == "ray" else ():
                tell(text)
            with workers(config, make_backend(config), results.folder, make, prompts, tell) as found:
                _same_judges(results, found.about())
                found.carry_out(left, total, write)
        except KeyboardInterrupt:
            raise Stopped(f"{done()} of {total} pictures are done; run it again to go on") from None


def _same_judges(results: "Results", found: dict[str, dict[str, Any]]) -> None:
    """Write how rewards proved themselves and what they score with; where pictures have scores, it must be the same.

    Raises:
        RunFolderError: those that scored before had other weights, packages or proofs.
    """
    from opd_ray.storage.run_folder import differences, read_json, write_json_atomic

    file = results.folder / JUDGES
    if results.rows and file.is_file() and (other := differences(read_json(file), found)):
        raise RunFolderError(
            f"{results.folder} was scored by other rewards: {'; '.join(other)}. Choose another --out, or judge as then"
        )
    write_json_atomic(file, found)


def folder_for(out: Path) -> Path:
    """The folder of an evaluation, absolute: its workers start elsewhere.

    Raises:
        RunFolderError: it cannot be made.
    """
    require_folder(out)
    return out.resolve()


def table_of(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Model -> score -> mean with its interval."""
    keys = list(dict.fromkeys(key for model in cells.values() for key in model))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("score", no_wrap=True)
    table.add_column("model", overflow="fold")
    for name in ("mean", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in keys:
        models = {name: scores[key] for name, scores in cells.items() if key in scores}
        write = alike(score[name] for score in models.values() for name in ("value", "low", "high"))
        for place, (name, score) in enumerate(models.items()):
            last = place == len(models) - 1
            table.add_row("" if place else key, name, *_cells(score, write), end_section=last)
    return table


def _cells(score: Mapping[str, Any], write: Write) -> list[str]:
    return [write(score["value"]), span(score["low"], score["high"], write) or MISSING, str(score["n"])]
