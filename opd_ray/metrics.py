"""metrics.jsonl, the one truth about a run's numbers: one JSON object a line, appended.

TensorBoard, W&B and Prometheus (``runtime/telemetry.py``) are mirrors of it: each row goes there too, and what goes
wrong there stays there.
"""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from opd_ray.config import Config
from opd_ray.errors import ConfigError, RunFolderError
from opd_ray.storage.run_folder import write_atomic

__all__ = ["Guard", "MetricsLog", "Mirror", "Writer", "check_logging", "mirrors", "rows", "scalars"]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete row, in the order of writing; none where there is no file.

    A last line without its end is ignored: it is being written, or a crash cut it off.

    Raises:
        RunFolderError: another line is not a JSON object.
    """
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunFolderError(f"{path}: line {number} is not a JSON object; remove the line")
        yield row


class MetricsLog:
    """The only writer of a metrics file. Holds no open file."""

    def __init__(self, path: Path, mirrors: "Sequence[Writer]" = ()) -> None:
        """Removes a torn last line, which the next row would otherwise run into."""
        self._path, self._mirrors = path, mirrors
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(path, content.rfind(b"\n") + 1)

    def append(self, row: Mapping[str, Any], *, null: bool = False) -> None:
        """Write one row through to the file.

        Args:
            row: JSON data; give it a ``round`` so that ``truncate_from`` can find it.
            null: write NaN and infinity as null, where they are expected.

        Raises:
            ValueError: a number is not finite, and ``null`` is false.
        """
        plain = {key: _finite(value, key, null) for key, value in row.items()}
        with self._path.open("ab") as file:
            file.write(json.dumps(plain).encode() + b"\n")
        for mirror in self._mirrors:
            mirror.write(plain)

    def close(self) -> None:
        """No more rows: the mirrors may end."""
        for mirror in self._mirrors:
            mirror.close()

    def truncate_from(self, round: int) -> None:
        """Drop what a resumed run will write again: rows whose ``round`` is this one or later."""
        kept = [row for row in rows(self._path) if "round" not in row or row["round"] < round]
        write_atomic(self._path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))


def _finite(value: Any, where: str, null: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part, f"{where}.{key}", null) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{where}[{index}]", null) for index, part in enumerate(value)]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if not null:
        raise ValueError(f"metric {where} is {value}, expected a finite number")
    return None


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row under one name each, as ``gap/text/3``. Its round and time are not among them."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and f"{prefix}{key}" not in {"round", "time"}:
            found[f"{prefix}{key}"] = value
    return found


class Writer(Protocol):
    """A tool that shows numbers."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Show a row's scalars at its round."""
        ...

    def close(self) -> None:
        """Everything is out."""
        ...


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, round: int) -> None:
        """``round``: the first that is written; what an earlier attempt wrote from there on is gone."""
        from torch.utils.tensorboard import SummaryWriter  # seconds, and not everybody has the package

        self._writer: Any = SummaryWriter(str(folder), purge_step=round)

    def write(self, row: Mapping[str, Any]) -> None:
        """One row, on disk at once."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["round"], walltime=row.get("time"))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """One run of Weights & Biases, the same one for every attempt."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        assert config.logging.wandb is not None
        path = folder / "wandb_id"
        if not path.exists():
            write_atomic(path, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project=config.logging.wandb.project,
            entity=config.logging.wandb.entity,
            name=config.name,
            id=path.read_text(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
            allow_val_change=True,  # what an attempt may change, for instance its workers
            settings=wandb.Settings(console="off"),  # the terminal is the live view's
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """One row, unless an earlier attempt sent it: W&B takes no step twice, and a repeated round is the same."""
        if row["round"] >= self._run.step:
            self._run.log(scalars(row), step=row["round"], commit=True)

    def close(self) -> None:
        """Wait until W&B has everything."""
        self._run.finish()


class Guard:
    """Lets a tool that shows numbers do things, and never end a run: the first error turns it off with one note."""

    def __init__(self, name: str, note: Callable[[str], None]) -> None:
        self._name, self._note = name, note
        self._off = False

    def attempt(self, act: Callable[[], None]) -> None:
        """Call ``act``, unless the tool is off."""
        if self._off:
            return
        try:
            act()
        except Exception as error:  # of a library that may raise anything
            self._off = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._note(f"{self._name} is off ({reason}); the run goes on, and metrics.jsonl has every row")


class Mirror:
    """One guarded writer, which opens at its first row."""

    def __init__(self, name: str, open: Callable[[int], Writer], note: Callable[[str], None]) -> None:
        self._guard, self._open = Guard(name, note), open
        self._writer: Writer | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Pass a row on."""
        self._guard.attempt(lambda: self._opened(row["round"]).write(row))

    def close(self) -> None:
        """End the writer, if there was a row."""
        if self._writer is not None:
            self._guard.attempt(self._writer.close)

    def _opened(self, round: int) -> Writer:
        if self._writer is None:
            self._writer = self._open(round)
        return self._writer


def check_logging(config: Config) -> None:
    """Refuse a tool that was asked for and is not installed.

    Raises:
        ConfigError: its package is missing.
    """
    if config.logging.wandb is not None and find_spec("wandb") is None:
        raise ConfigError(
            "logging.wandb: the package wandb is not installed; pip install 'opd-ray[wandb]', or set logging.wandb=null"
        )


def mirrors(config: Config, folder: Path, note: Callable[[str], None]) -> list[Mirror]:
    """TensorBoard where its package is installed, W&B where the configuration asks for it."""
    found = []
    if find_spec("tensorboard") is not None:
        found.append(Mirror("TensorBoard", lambda round: TensorBoard(folder / "tensorboard", round), note))
    if config.logging.wandb is not None:
        found.append(Mirror("W&B", lambda round: Wandb(config, folder), note))
    return found
