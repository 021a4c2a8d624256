"""``opd-ray score IMAGES_DIR``: the scores of pictures that were made elsewhere."""

import hashlib
import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from opd_ray.commands.judging import Cluster, ClusterKeys, RewardNames, carry_out, config_of, folder_for, versions_of
from opd_ray.commands.options import Json, Threads

__all__ = ["score"]


def score(
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES_DIR",
            help="GenEval's layout, the folder of an evaluation or of a run's samples, or one with metadata.jsonl.",
        ),
    ],
    rewards: RewardNames = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt file whose rows name a picture of the folder too: file, file_name.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures that are scored together.")] = 8,
    cluster: Cluster = None,
    override: ClusterKeys = None,
    out: Annotated[Path, typer.Option(help="Folder of the scores; run it again to go on.")] = Path("scores"),
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Write one row a picture, and means with 95 % bootstrap intervals."""
    from opd_ray.evaluation.given import given_parts, given_pictures
    from opd_ray.evaluation.hosts import ReadingHost
    from opd_ray.evaluation.parts import Results
    from opd_ray.scoring import a_few

    config = config_of(rewards or [], cluster, override or [], threads)
    pictures = given_pictures(images, prompts)
    parts, versions = given_parts(images, pictures, batch), versions_of(config)
    stamps = [(one.file, one.prompt.text, *_stamp(images / one.file)) for one in pictures]
    digest = hashlib.sha256(json_module.dumps(stamps).encode()).hexdigest()
    asked = {"pictures": len(pictures), "pictures_sha256": digest, "batch": batch, "versions": versions}
    results = Results(folder_for(out), tuple(config.rewards), asked)
    told = {"images": str(images), "versions": versions}
    carry_out(config, results, parts, ReadingHost, a_few([picture.prompt for picture in pictures]), told, json=json)


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
