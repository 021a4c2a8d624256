from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opd_ray.plugins import load
from opd_ray.rewards import REWARDS
from tests.rewards import tiny


@dataclass
class Scorer:
    """A reward's arguments that point to a small model, and where its files are."""

    folder: Path
    args: dict[str, Any]
    name: str
    file: str
    """The one with weights of its own."""
    made: Any = field(default=None)

    def make(self, **other: Any) -> Any:
        return load(self.name, REWARDS, "reward")(**self.args | other)


def scorer(name: str, folder: Path) -> Scorer:
    folder.mkdir()
    where = str(folder)
    match name:
        case "pickscore" | "clipscore":
            tiny.make_clip(folder)
            return Scorer(folder, {"model": where, "processor": where}, name, "model.safetensors")
        case "aesthetic":
            tiny.make_head(tiny.make_clip(folder), 12)
            return Scorer(folder, {"model": where, "head": where}, name, "aesthetic-model.pth")
        case "imagereward":
            tiny.make_imagereward(folder)
            return Scorer(folder, {"model": where, "tokenizer": where}, name, "ImageReward.pt")
    file = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2_1": "HPS_v2.1_compressed.pt"}[name]
    tiny.make_hps(folder, file)
    return Scorer(folder, {"model": where, "architecture": tiny.know_hps(folder)}, name, file)


NAMES = ("pickscore", "clipscore", "aesthetic", "hpsv2", "hpsv2_1", "imagereward")


@pytest.fixture(scope="session")
def scorers(tmp_path_factory) -> dict[str, Scorer]:
    """Every neural reward, made once; tests leave their files as they are."""
    top = tmp_path_factory.mktemp("rewards")
    found = {name: scorer(name, top / name) for name in NAMES}
    for one in found.values():
        one.made = one.make()
    return found
