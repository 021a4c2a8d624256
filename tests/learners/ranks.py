"""One of two rank processes without Ray, which go through every backend and every pair of them.

Run as ``python -m tests.learners.ranks FOLDER MODEL PART`` with RANK set; what it saw is left in the folder.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from opd_ray.algorithms import Facts
from opd_ray.algorithms.dmd import Dmd
from opd_ray.algorithms.flow_grpo import FlowGrpo
from opd_ray.algorithms.opd import Opd
from opd_ray.algorithms.opd_ppo import OpdPpo
from opd_ray.config import (
    DmdConfig,
    EmaConfig,
    FlowGrpoConfig,
    LearnerPlacement,
    LoraConfig,
    OpdConfig,
    OpdPpoConfig,
    OptimizerConfig,
)
from opd_ray.diffusion import KERNELS, sample
from opd_ray.errors import DriftError
from opd_ray.learners import Engine, Learner, LearnerState, fsdp2, make_engine
from opd_ray.learners.deepspeed import DeepSpeedEngine
from opd_ray.learners.fsdp2 import FsdpEngine
from opd_ray.storage import checkpoint, run_folder
from opd_ray.types import Experience, WorkItem
from tests.algorithms.parts import fill, item, learner, load, random_experience
from tests.learners.live import alive, replaced, spread_by

BACKENDS = {
    "ddp": {"backend": "ddp"},
    "fsdp2": {"backend": "fsdp2"},
    "zero1": {"backend": "deepspeed", "zero_stage": 1},
    "zero2": {"backend": "deepspeed", "zero_stage": 2},
    "zero3": {"backend": "deepspeed", "zero_stage": 3},
}
CROSSED = tuple((one, other) for one in BACKENDS for other in BACKENDS if one == other or "ddp" in (one, other))
"""Who goes on from whose checkpoint: each from its own, and to and from ``ddp``."""
CROSSED_TOO = tuple((one, other) for one in BACKENDS for other in BACKENDS if (one, other) not in CROSSED)
OFFLOADED = {f"{name}-offload": BACKENDS[name] | {"cpu_offload": True} for name in ("zero1", "zero2", "zero3")}
ROUNDS, SAVED = 5, 3
LORA = LoraConfig(rank=4, alpha=8, targets=("attn.to_q", "attn.to_out.0", "attn.add_k_proj"))
"""Over a few layers: of ZeRO-3 each one takes its time."""
FULL = "full-"
"""Before the name of a backend that trains every weight of the network."""
IN_FULL = tuple(FULL + name for name in BACKENDS)
OFFLOADED_TOO = (*OFFLOADED, FULL + "zero2-offload")
SPREADING = ("fsdp2", "zero3", FULL + "fsdp2", FULL + "zero3")
SEVERAL = ("ddp", "fsdp2")
"""Train two adapters, of which an update may have one alone."""
NEXT = dict(zip(BACKENDS, [*list(BACKENDS)[1:], "ddp"], strict=True))
"""Each backend goes on once from another one's full weights, and another once from its."""
ORDER = (("a", 0), ("a", 1), ("b", 0))
"""Three items a round, so that of two ranks one has less to do."""
COMPARING = {
    "flow_grpo": partial(FlowGrpo, FlowGrpoConfig(name="flow_grpo", clip_range=0.1, item_parts=2)),
    "opd_ppo": partial(OpdPpo, OpdPpoConfig(name="opd_ppo", clip_range=0.1, item_parts=2)),
}
"""Algorithms that compare with the policy that drew: two updates a round, of which the second is off that policy."""


class Following(Opd):
    """With a second adapter, which follows the student by half and is what gets published."""

    adapters = ("old",)
    behaviour = "old"

    def follow(self, adapter, round):
        return 0.5


def make(tiny: Path, engine: Engine, algorithm: str | None = None, **changes) -> Learner:
    options = {
        "lora": LORA,
        "ema": EmaConfig(decay=0.5, every=2),
        "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.1, clip=1e-4),
    }
    filled = changes.pop("filled", True)
    options |= changes
    if options["lora"] is None:
        return learner(tiny, Opd(OpdConfig()), engine=engine, **options)
    chosen = COMPARING[algorithm]() if algorithm else Following(OpdConfig())
    one = learner(tiny, chosen, engine=engine, **options)
    if filled:
        start(one, tiny)
    return one


def start(one: Learner, tiny: Path) -> None:
    """A student whose B is not zero, the same on each backend."""
    family = load(tiny)
    family.add_lora("student", one.training.lora, 0)
    whole = fill(family, "student", 9)
    for held in one._groups().values():
        for name, (parameter, part) in held.items():
            one.engine.write(parameter, part, whole[name])
    one.engine.written()


def train(one: Learner, rounds, family) -> list[dict]:
    """Losses, norms and whole accumulated gradients, a round each."""
    found = []
    for number in rounds:
        work = [item(task=t, index=i, position=n, round=number, steps=(0,)) for n, (t, i) in enumerate(ORDER)]
        one.begin(work)
        for part in work:
            if one.owner(part) == one.engine.rank:
                one.take(random_experience(family, part, seed=10 * number + part.position))
        found.append(updated(one, 0))
        one.finish_round(number)
    return found


def updated(one: Learner, number: int) -> dict:
    """Loss, norm and whole accumulated gradient of one update."""
    seen = {}

    def recording(scale):
        seen.update(one.engine.gradients())
        return step(scale)

    with replaced(one.engine, "step", recording) as step:
        report = one.update(number)
    return {"loss": report.loss, "norm": report.grad_norm, "skipped": report.skipped, "gradients": seen}


def compare(one: Learner, off: float = 0.0) -> list[dict]:
    """The two updates of a round on the student's own drawings; a prompt's images are with both ranks.

    ``off`` is by how much the second rank's drawings were made of other velocities.
    """
    one.algorithm.facts = Facts(num_steps=4, images_per_prompt=2)
    work = [item(task=t, index=i, position=4 * n + i, steps=(0,)) for n, t in enumerate("ab") for i in range(4)]
    one.begin(work)
    for part in work:
        if one.owner(part) == one.engine.rank:
            one.take(drawing(one, part, off * one.engine.rank))
    one.observe([(part, {"x": torch.tensor([float(part.position), -(part.position % 3.0)])}) for part in work])
    return [updated(one, number) for number in range(2)]


@torch.no_grad()
def drawing(one: Learner, work: WorkItem, off: float) -> Experience:
    """The first step as the student makes it, or nearly, from a random state; a teacher's velocities at random."""
    known = random_experience(one.family, work, seed=work.position)
    path, algorithm = known.trajectory, one.algorithm
    now, then = path.sigmas[:2].tolist()
    x, velocities = path.latents[:, 0], torch.zeros_like(path.latents[:, 1:])
    velocities[:, 0] = one.family.velocity(x, now, path.cond, path.uncond, one.training.guidance)
    velocities[:, 0] += off
    step = KERNELS[algorithm.kernel](x, velocities[:, 0], now, then, algorithm.noise_level)
    path.latents[:, 1] = sample(step, path.latents[:, 1])  # which is random
    return replace(known, trajectory=replace(path, velocities=velocities))


def train_several(tiny: Path, engine: Engine, family) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Two updates of `fake`, the second also of the student, twice: what is told, and all moments."""
    chosen = OptimizerConfig(lr=1e-3, clip=1e-2)
    one, told = (
        learner(tiny, Dmd(DmdConfig(name="dmd", fake_updates=2)), engine=engine, lora=LORA, optimizer=chosen),
        [],
    )
    for number in range(2):
        work = [item(task=t, index=i, position=n, round=number) for n, (t, i) in enumerate(ORDER)]
        one.begin(work)
        for part in work:
            if one.owner(part) == one.engine.rank:
                one.take(random_experience(family, part, seed=10 * number + part.position, velocities=True))
        for update in range(2):
            report = one.update(update)
            told.append({"loss": report.loss, "norm": report.grad_norm})
        one.finish_round(number)
    return told, {key: value.clone() for key, value in one.engine.moments()}


def save(one: Learner, folder: Path) -> None:
    """A real checkpoint, by the first rank; every rank gathers."""
    state = one.state()
    if one.engine.rank == 0:
        attempt = run_folder.claim(folder, {})
        saved = checkpoint.Checkpoint(SAVED, state.tensors, {"learner": state.values})
        checkpoint.save(folder, saved, attempt=attempt, keep=1)
    torch.distributed.barrier()


def restore(one: Learner, folder: Path) -> None:
    saved, notes = checkpoint.newest(folder)
    assert saved is not None and not notes
    one.load_state(LearnerState(saved.tensors, saved.state["learner"]))


def of_all(name: str) -> tuple[str, dict[str, Any]]:
    """The backend of a name, and what makes its learner train all weights."""
    return name.removeprefix(FULL), {"lora": None} if name.startswith(FULL) else {}


class Rank:
    """What one rank sees, into files of the folder."""

    def __init__(self, folder: Path, tiny: Path, rank: int) -> None:
        self.folder, self.tiny, self.rank, self.family = folder, tiny, rank, load(tiny)

    def engine(self, name: str) -> Engine:
        return make_engine(LearnerPlacement(ranks=2, **(BACKENDS | OFFLOADED)[name]), self.rank)

    def note(self, name: str, found: Any) -> None:
        self.folder.joinpath(f"{name}-{self.rank}.json").write_text(json.dumps(found))

    def write(self, name: str, rounds: list[dict]) -> None:
        self.note(name, [{key: value for key, value in one.items() if key != "gradients"} for one in rounds])
        gradients = {f"{n}:{key}": g for n, one in enumerate(rounds) for key, g in one["gradients"].items()}
        save_file({key: g.contiguous() for key, g in gradients.items()}, self.file(f"{name}-{self.rank}"))

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def run(self, name: str) -> None:
        """All rounds of one backend, with a checkpoint on the way."""
        backend, changes = of_all(name)
        one = make(self.tiny, self.engine(backend), **changes)
        rounds = train(one, range(SAVED), self.family)
        if backend in BACKENDS:
            save(one, self.folder / f"saved-{name}")
        rounds += train(one, range(SAVED, ROUNDS), self.family)
        self.write(name, rounds)
        proof = {"probe": one.probe(), "mean": one.probe(average=True), **dict(one.gather(average=True))}
        save_file({key: t.clone() for key, t in proof.items()}, self.file(f"proof-{name}-{self.rank}"))
        self.note(f"hashes-{name}", one.hashes())
        if name in IN_FULL:
            self.note(f"alive-{name}", alive(one, self.folder / "exported"))

    def several(self, name: str) -> None:
        """Rounds of two adapters."""
        told, moments = train_several(self.tiny, self.engine(name), self.family)
        self.note(f"several-{name}", told)
        save_file(moments, self.file(f"several-{name}-{self.rank}"))

    def compare(self, name: str) -> None:
        """A round of an algorithm that compares with the policy that drew."""
        self.write(name, compare(make(self.tiny, self.engine("ddp"), name)))

    def drift(self, name: str) -> None:
        """Such a round in which one of both ranks got drawings that the student would not make."""
        one = make(self.tiny, self.engine("ddp"), name)
        before, told = one.hashes(), ""
        try:
            compare(one, off=10.0)
        except DriftError as error:
            told = str(error)
        self.note(f"drift-{name}", {"told": told, "unchanged": one.hashes() == before})

    def go_on(self, source: str, target: str) -> None:
        """The last rounds, from what another backend saved."""
        _, changes = of_all(source)
        one = make(self.tiny, self.engine(target), **(changes or {"filled": False, "seed": 99}))
        restore(one, self.folder / f"saved-{source}")
        self.write(f"{source}-{target}", train(one, range(SAVED, ROUNDS), self.family))
        if changes:
            one.export(self.folder / f"{source}-{target}")

    def in_half(self, name: str, form: str) -> None:
        """A few rounds with weights, or where all are trained with autocast alone, in half precision."""
        backend, changes = of_all(name)
        changes |= {"gradient_checkpointing": True} | ({} if changes else {"dtype": getattr(torch, form)})
        one = make(self.tiny, self.engine(backend), **changes)
        one.family.dtype = getattr(torch, form)
        self.write(f"{name}-{form}", train(one, range(2), self.family))
        first = one.family.network.transformer_blocks[0].attn.to_q
        assert getattr(first, "base_layer", first).weight.dtype == changes.get("dtype", torch.float32)

    def spread(self, name: str) -> list[tuple[int, int]]:
        """How a network gets onto a rank's device: see ``spread_by``."""
        backend, changes = of_all(name)
        family = load(self.tiny)
        family.add_student("student", changes.get("lora", LORA), 0)
        family.train_adapter("student")
        engine = self.engine(backend)
        with spread_by(engine, family.network) as steps:
            engine.prepare(family.network, partial(family.adapter_parameters, "student"), OptimizerConfig())
        return steps

    def refused(self) -> dict[str, str]:
        """What engines say that did not get what they asked for."""

        def start(make_one: Callable[[], Engine]) -> str:
            family = load(self.tiny)
            family.add_own("student")
            family.train_adapter("student")
            try:
                make_one().prepare(family.network, partial(family.adapter_parameters, "student"), OptimizerConfig())
            except RuntimeError as error:
                return str(error)
            return "started"

        class Lower(DeepSpeedEngine):
            def _config(self, *args: Any) -> dict[str, Any]:
                config = super()._config(*args)
                config["zero_optimization"]["stage"] = 1
                return config

        found = {
            f"{backend} of 3": start(partial(make_engine, LearnerPlacement(backend=backend, ranks=3), self.rank))
            for backend in ("fsdp2", "deepspeed")
        }
        found["fsdp2 as another rank"] = start(lambda: FsdpEngine(1 - self.rank, 2))
        found["deepspeed of another stage"] = start(lambda: Lower(self.rank, 2, stage=2))
        with replaced(fsdp2, "fully_shard", lambda module, **options: module):
            found["fsdp2 that shards nothing"] = start(lambda: FsdpEngine(self.rank, 2))
        return found


def main(folder: Path, tiny: Path, part: str, rank: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for each engine, and looks through all that was imported
    one = Rank(folder, tiny, rank)
    if part == "more":
        for name in (*OFFLOADED_TOO, *BACKENDS):
            one.run(name)
        for source, target in CROSSED_TOO:
            one.go_on(source, target)
        for name in BACKENDS:
            for form in ("bfloat16", "float16"):
                one.in_half(name, form)
            one.in_half(FULL + name, "bfloat16")
        return
    for name in (*BACKENDS, *IN_FULL):
        one.run(name)
    for name in SEVERAL:
        one.several(name)
    for source, target in CROSSED:
        one.go_on(source, target)
    for source, target in NEXT.items():
        one.go_on(FULL + source, target)
    for name in SPREADING:
        one.note(f"spread-{name}", one.spread(name))
    for name in COMPARING:
        one.compare(name)
        one.drift(name)
    one.note("refused", one.refused())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(os.environ["RANK"]))
