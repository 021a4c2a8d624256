"""What the tests of algorithms, actors, learners and runs are put together from, over the tiny random SD3."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_ray.actors import Ack, Policy, RolloutActor
from opd_ray.algorithms import Algorithm
from opd_ray.algorithms.opd import Opd
from opd_ray.config import Config, LoraConfig, ModelConfig, OpdConfig, OptimizerConfig, TeacherConfig, parse
from opd_ray.digest import checksum, digest
from opd_ray.learners import DdpEngine, Engine, Learner
from opd_ray.learners.learner import Training
from opd_ray.models import Family, load_family
from opd_ray.seeds import fold
from opd_ray.storage.packing import bind_into, pack
from opd_ray.types import Experience, Prompt, TeacherAnswer, Trajectory, WeightVersion, WorkItem
from tests.models.tiny_sd3 import make_tiny_sd3

LORA = LoraConfig(rank=4, alpha=8)
VERSION = WeightVersion(0, 0, 0)
TEXTS = ("a red cat", "two blue dogs", "the word hi", "seven ships")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """One tiny model for all the folders of tests that ask for it."""
    folder = tmp_path_factory.getbasetemp() / "parts-sd3"
    return folder if folder.exists() else make_tiny_sd3(folder)


def load(tiny: Path, *, whole: bool = False) -> Family:
    return load_family(ModelConfig(path=str(tiny)), text=whole, image=whole)


def prompt(text: str, task: str = "a") -> Prompt:
    return Prompt(text.replace(" ", "-"), text, task)


def on(family: Family) -> Callable[[TeacherConfig], Family]:
    """All teachers stand on this one."""
    return lambda teacher: family


def item(
    texts: Sequence[str] = TEXTS[:2],
    *,
    task: str = "a",
    round: int = 0,
    index: int = 0,
    position: int = 0,
    steps: Sequence[int] = (0, 1),
) -> WorkItem:
    prompts = tuple(prompt(text, task) for text in texts)
    return WorkItem(round, task, index, position, prompts, (0,) * len(prompts), tuple(steps))


@torch.no_grad()
def fill(family: Family, name: str, seed: int = 0, scale: float = 0.1) -> dict[str, Tensor]:
    """Weights that are not zero, and what they are."""
    for index, parameter in enumerate(family.adapter_parameters(name).values()):
        noise = torch.Generator().manual_seed(1000 * seed + index)
        parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))
    return {key: parameter.detach().clone() for key, parameter in family.adapter_parameters(name).items()}


def write_loras(tiny: Path, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """A LoRA folder for each name, each with weights of its own; the first has ``fill``'s seed 1."""
    family, paths = load(tiny), {}
    for seed, name in enumerate(names, start=1):
        family.add_lora(name, LORA, 0)
        fill(family, name, seed)
        family.save_lora(name, folder / name)
        paths[name] = str(folder / name)
    return paths


def vary(tiny: Path, folder: Path, seed: int) -> Path:
    """A copy of the tiny model with another denoiser."""
    shutil.copytree(tiny, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def write_specialists(
    tiny: Path, folder: Path, loras: Sequence[str], checkpoints: Sequence[str]
) -> dict[str, TeacherConfig]:
    """Teachers by name: LoRAs over the tiny model, then full checkpoints of its kind."""
    paths = write_loras(tiny, folder / "loras", loras)
    full = {name: str(vary(tiny, folder / name, seed)) for seed, name in enumerate(checkpoints)}
    return {name: TeacherConfig(lora=path, guidance=2.0) for name, path in paths.items()} | {
        name: TeacherConfig(model=path, guidance=2.0) for name, path in full.items()
    }


def rollout_actor(
    tiny: Path,
    *,
    family: Family | None = None,
    num_steps: int = 4,
    pictured: Callable[[Trajectory], Tensor | None] = lambda path: None,
    **changes: Any,
) -> RolloutActor:
    """An actor that has bound non-zero weights of version 0.0.0."""
    policy: dict[str, Any] = {
        "lora": LORA,
        "adapter": "student",
        "guidance": 1.5,
        "kernel": "flow",
        "noise_level": 0.0,
        "seed": 7,
        "probe_tolerance": 1e-3,
        "negatives": True,
    }
    family = family or load(tiny, whole=True)
    return RolloutActor(family, Policy(**(policy | changes)), family.sigmas(num_steps), pictured)


def bind(actor: RolloutActor, seed: int = 5) -> str:
    """Fill the behaviour adapter as ``fill`` does and prove it; returns the hash."""
    return give(actor, fill(actor.family, "student", seed)).sha256


def give(actor: RolloutActor, weights: Mapping[str, Tensor], version: WeightVersion = VERSION) -> Ack:
    """Bind weights as they come out of the object store, and prove them."""
    flat, manifest = pack(weights)
    flat.flags.writeable = False
    write = partial(bind_into, flats=[flat], manifests=[manifest])
    return actor.bind(write, version, digest(weights), checksum(weights))


def random_experience(
    family: Family,
    work: WorkItem,
    *,
    num_steps: int = 4,
    seed: int = 0,
    negatives: bool = True,
    velocities: bool = False,
) -> Experience:
    """States, conditioning and a teacher's velocities at random: nothing has to be drawn for it.

    ``velocities``: also those of whoever drew it.
    """
    rng = torch.Generator().manual_seed(seed)
    rows, shape = len(work.prompts), family.latent_shape
    conds = [family.random_conditioning(rng) for _ in range(rows)]
    cond = {name: torch.cat([one[name] for one in conds]) for name in conds[0]}
    uncond = family.random_conditioning(rng) if negatives else {}
    latents = torch.randn((rows, num_steps + 1, *shape), generator=rng)
    velocity = torch.randn((rows, len(work.steps), *shape), generator=rng)
    drawn = torch.randn((rows, num_steps, *shape), generator=rng) if velocities else None
    trajectory = Trajectory(work, VERSION, family.sigmas(num_steps), latents, cond, uncond, velocities=drawn)
    return Experience(work, trajectory, TeacherAnswer("t", work.steps, velocity))


def learner(
    tiny: Path,
    algorithm: Algorithm | None = None,
    *,
    engine: Engine | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    rounds: int = 8,
    **changes: Any,
) -> Learner:
    training: dict[str, Any] = {"lora": LORA, "guidance": 1.5, "optimizer": OptimizerConfig(lr=1e-2), "ema": None}
    chosen = Training(**(training | changes), seed=seed, rounds=rounds)
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False, dtype=dtype)
    return Learner(family, algorithm or Opd(OpdConfig()), chosen, engine or DdpEngine(0, 1))


def stage(one: Learner, experience: Sequence[Experience]) -> None:
    """A whole round's inputs, as they come in a run."""
    one.begin([part.item for part in experience])
    for part in experience:
        one.take(part)
    one.observe([(part.item, part.scores) for part in experience])


def gradients(one: Learner) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in one.student.items()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


def run_config(tiny: Path, **sections: Any) -> Config:
    """A run in this process, as small as it gets; sections are replaced whole."""
    data: dict[str, Any] = {
        "name": "small",
        "seed": 11,
        "rounds": 2,
        "model": {"path": str(tiny)},
        "student": {"lora": {"rank": 4, "alpha": 8}, "guidance": 1.5},
        "sampling": {"steps": 3},
        "optimizer": {"lr": 1e-2},
        "batch": {"images_per_task": 2, "item_size": 2},
        "checkpoint": {"every": 1},
        "cluster": {"runtime": "local"},
    }
    return parse(data | sections, "test")


def init_seed(seed: int) -> int:
    """The seed of a run's first adapter."""
    return fold(seed, "lora")
