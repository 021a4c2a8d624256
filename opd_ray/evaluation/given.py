"""Pictures that were made elsewhere: which files there are, and of which prompts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ray.errors import PromptError
from opd_ray.evaluation.parts import TABLE, Part
from opd_ray.pairs.pictures import FORMATS, orientation
from opd_ray.prompts import PromptFile, read_files
from opd_ray.types import Prompt

__all__ = ["Picture", "given_parts", "given_pictures"]

FILE_COLUMNS = ("file", "file_name", "image")
STAND_IN = (64, 64)
"""Width and height of what is scored in the place of a file without any."""
LISTS = ("metadata.jsonl", "metadata.csv", "index.jsonl", "index.csv")
EXPECTED = (
    f"expected GenEval's layout (00000/metadata.jsonl and 00000/samples/*.png), the folder of an evaluation ({TABLE}) "
    f"or of a run's samples (index.json), or {', '.join(LISTS)}, or --prompts FILE, whose rows name a picture "
    f"({' or '.join(FILE_COLUMNS)}) and its prompt"
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A file and its prompt."""

    file: str
    """As seen from the folder."""
    prompt: Prompt
    sample: int = 0
    """Which picture of its prompt it is."""
    model: str = ""
    """Who made it, where the folder says it."""


def given_pictures(folder: Path, prompts: Path | None = None) -> list[Picture]:
    """The pictures of a folder, in the order in which it names them.

    Args:
        folder: where they are.
        prompts: a prompt file whose rows also name a picture, as seen from the folder.

    Raises:
        PromptError: it is none of the known layouts, or a file is missing or outside of the folder.
    """
    if not folder.is_dir():
        raise PromptError(f"{folder} is no folder; {EXPECTED}")
    lists = [prompts] if prompts is not None else [folder / name for name in LISTS if (folder / name).is_file()]
    index = next((one for one in (folder / "index.json", folder / "samples" / "index.json") if one.is_file()), None)
    if lists:
        found = list(_listed(lists[0], "--prompts" if prompts is not None else "score"))
    elif (folder / TABLE).is_file():
        found = list(_evaluated(folder / TABLE))
    elif index is not None:
        found = list(_samples(index, folder))
    else:
        found = list(_geneval(folder))
    if not found:
        raise PromptError(f"{folder} has no pictures that can be told from one another; {EXPECTED}")
    for one in found:
        if Path(one.file).is_absolute() or ".." in Path(one.file).parts:
            raise PromptError(
                f"{folder}: a row names the picture {one.file!r}, which is not below this folder; expected a path as "
                "seen from it, for instance samples/0.png"
            )
    if missing := [one.file for one in found if not (folder / one.file).is_file()]:
        raise PromptError(f"{folder}: {len(missing)} of {len(found)} pictures are not there, first {missing[0]}")
    return found


def given_parts(folder: Path, pictures: Sequence[Picture], batch: int) -> list[Part]:
    """Parts whose pictures have one size and one maker; those that cannot be read are parts of their own.

    Raises:
        PromptError: none of the files is a picture.
    """
    groups: dict[tuple[str, tuple[int, int] | None], list[Picture]] = {}
    for one in pictures:
        groups.setdefault((one.model or folder.resolve().name, _size(folder / one.file)), []).append(one)
    if all(size is None for _, size in groups):
        raise PromptError(
            f"{folder}: none of its {len(pictures)} pictures is a {', '.join(FORMATS)} that can be read, "
            f"first {pictures[0].file}"
        )
    parts = []
    for number, ((model, size), rows) in enumerate(groups.items()):
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            known = {"seed": None, "steps": None, "guidance": None}
            table = tuple({"sample": one.sample, **known, "file": one.file} for one in some)
            args = ([str((folder / one.file).resolve()) for one in some], size or STAND_IN)
            name = f"{number:02d}-{start:07d}"
            parts.append(Part(name, model, tuple(one.prompt for one in some), table, "read", args))
    return parts


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height as it is shown, from the beginning of the file alone; None where it is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            return (width, height) if orientation(picture) < 5 else (height, width)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _listed(path: Path, what: str) -> Iterator[Picture]:
    """Rows of a prompt file that name a picture too."""
    for prompts in read_files([PromptFile(str(path), otherwise="pictures")], what).values():
        for prompt in prompts:
            column = next((name for name in FILE_COLUMNS if prompt.metadata.get(name)), None)
            if column is None:
                raise PromptError(
                    f"{what}: {path}: the row of {prompt.text!r} names no picture; give it a column "
                    f"{' or '.join(FILE_COLUMNS)}"
                )
            yield Picture(str(prompt.metadata[column]), prompt)


def _evaluated(path: Path) -> Iterator[Picture]:
    """Pictures that an evaluation wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Mapping[str, Any]] = pq.read_table(path).to_pylist()
        for row in rows:
            if row["file"]:
                prompt = Prompt(row["prompt_id"], row["prompt"], row["task"], json.loads(row["metadata"]))
                yield Picture(row["file"], prompt, row["sample"], row["model"])
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        raise PromptError(f"{path} is not the table of an evaluation ({' '.join(str(error).split())})") from None


def _samples(index: Path, folder: Path) -> Iterator[Picture]:
    """Pictures of a run's report."""
    beside = index.parent.relative_to(folder)
    try:
        for number, row in enumerate(json.loads(index.read_bytes())["rows"]):
            prompt = Prompt(f"{row['task']}/{number}", row["prompt"], row["task"])
            for model, file in row["images"].items():
                yield Picture(str(beside / file), prompt, 0, model)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise PromptError(f"{index} is not the index of a run's samples ({error})") from None


def _geneval(folder: Path) -> Iterator[Picture]:
    """GenEval's: a folder a prompt, with its row of the metadata file and its samples."""
    for place in sorted(one.parent for one in folder.glob("*/metadata.jsonl")):
        prompts = read_files([PromptFile(str(place / "metadata.jsonl"), otherwise="geneval")], "score")
        ((row, *more), *tasks) = prompts.values()
        if more or tasks:
            raise PromptError(f"{place / 'metadata.jsonl'} has several rows, expected that of the folder's prompt")
        prompt = Prompt(f"{row.task}/{place.name}", row.text, row.task, row.metadata)
        kinds = (".png", ".jpg", ".jpeg", ".webp")
        files = sorted(file for file in (place / "samples").glob("*") if file.suffix.lower() in kinds)
        if not files:
            raise PromptError(f"{place / 'samples'} has no pictures; expected {', '.join(kinds)}")
        for sample, file in enumerate(files):
            yield Picture(str(file.relative_to(folder)), prompt, sample)
