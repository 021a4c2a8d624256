"""One of two rank processes without Ray, which go through every backend and every pair of them.

Run as ``python -m tests.learners.ranks FOLDER MODEL`` with RANK set; what it saw is left in the folder.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from opd_ray.algorithms.opd import Opd
from opd_ray.config import EmaConfig, LearnerPlacement, OpdConfig, OptimizerConfig
from opd_ray.learners import Engine, Learner, LearnerState, make_engine
from opd_ray.storage import checkpoint, run_folder
from tests.algorithms.parts import LORA, fill, item, learner, load, random_experience

BACKENDS = {
    "ddp": {"backend": "ddp"},
    "fsdp2": {"backend": "fsdp2"},
    "zero1": {"backend": "deepspeed", "zero_stage": 1},
    "zero2": {"backend": "deepspeed", "zero_stage": 2},
    "zero3": {"backend": "deepspeed", "zero_stage": 3},
}
OFFLOADED = {f"{name}-offload": BACKENDS[name] | {"cpu_offload": True} for name in ("zero1", "zero2", "zero3")}
ROUNDS, SAVED = 5, 3
FULL = "full-"
"""Before the name of a backend that trains every weight of the network."""
IN_FULL = tuple(FULL + name for name in (*BACKENDS, "zero2-offload"))
NEXT = dict(zip(BACKENDS, [*list(BACKENDS)[1:], "ddp"], strict=True))
"""Each backend goes on once from another one's full weights, and another once from its."""
ORDER = (("a", 0), ("a", 1), ("b", 0))
"""Three items a round, so that of two ranks one has less to do."""


class Following(Opd):
    """With a second adapter, which follows the student by half and is what gets published."""

    adapters = ("old",)
    behaviour = "old"

    def follow(self, adapter, round):
        return 0.5


def make(tiny: Path, engine: Engine, **changes) -> Learner:
    options = {"ema": EmaConfig(decay=0.5, every=2), "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.1, clip=1e-4)}
    filled = changes.pop("filled", True)
    if changes.get("lora", LORA) is None:
        return learner(tiny, Opd(OpdConfig()), engine=engine, **(options | changes))
    one = learner(tiny, Following(OpdConfig()), engine=engine, **(options | changes))
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
    seen, step = [], one.engine.step

    def recording(scale):
        seen.append(one.engine.gradients())
        return step(scale)

    one.engine.step, reports = recording, []
    for number in rounds:
        work = [item(task=t, index=i, position=n, round=number, steps=(0,)) for n, (t, i) in enumerate(ORDER)]
        one.begin(work)
        for part in work:
            if one.owner(part) == one.engine.rank:
                one.take(random_experience(family, part, seed=10 * number + part.position))
        report = one.update(0)
        one.finish_round(number)
        reports.append({"loss": report.loss, "norm": report.grad_norm, "skipped": report.skipped})
    one.engine.step = step
    return [{**report, "gradients": gradients} for report, gradients in zip(reports, seen, strict=True)]


def write(folder: Path, name: str, rounds: list[dict]) -> None:
    numbers = [{key: value for key, value in one.items() if key != "gradients"} for one in rounds]
    folder.joinpath(f"{name}.json").write_text(json.dumps(numbers))
    gradients = {f"{n}:{key}": g for n, one in enumerate(rounds) for key, g in one["gradients"].items()}
    save_file({key: g.contiguous() for key, g in gradients.items()}, folder / f"{name}.safetensors")


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


def main(folder: Path, tiny: Path, rank: int) -> None:
    torch.set_num_threads(1)
    family = load(tiny)

    def engine(name):
        placement = LearnerPlacement(ranks=2, **(BACKENDS | OFFLOADED)[name])
        return make_engine(placement, rank)

    for name in (*BACKENDS, *OFFLOADED, *IN_FULL):
        of_all, backend = {"lora": None} if name.startswith(FULL) else {}, name.removeprefix(FULL)
        one = make(tiny, engine(backend), **of_all)
        rounds = train(one, range(SAVED), family)
        if backend in BACKENDS:
            save(one, folder / f"saved-{name}")
        rounds += train(one, range(SAVED, ROUNDS), family)
        write(folder, f"{name}-{rank}", rounds)
        proof = {"probe": one.probe(), "mean": one.probe(average=True), **one.weights(average=True)}
        save_file({key: t.clone() for key, t in proof.items()}, folder / f"proof-{name}-{rank}.safetensors")
        folder.joinpath(f"hashes-{name}-{rank}.json").write_text(json.dumps(one.hashes()))
    for source in BACKENDS:
        for target in BACKENDS:
            one = make(tiny, engine(target), filled=False, seed=99)
            restore(one, folder / f"saved-{source}")
            write(folder, f"{source}-{target}-{rank}", train(one, range(SAVED, ROUNDS), family))
    for source, target in NEXT.items():
        one = make(tiny, engine(target), lora=None)
        restore(one, folder / f"saved-{FULL}{source}")
        write(folder, f"{FULL}{source}-{target}-{rank}", train(one, range(SAVED, ROUNDS), family))
        one.export(folder / f"{FULL}{source}-{target}")
    for name in BACKENDS:
        for form in ("bfloat16", "float16"):
            one = make(tiny, engine(name), dtype=getattr(torch, form), gradient_checkpointing=True)
            write(folder, f"{name}-{form}-{rank}", train(one, range(2), family))
            assert one.family.network.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == one.family.dtype
        one = make(tiny, engine(name), lora=None, gradient_checkpointing=True)
        one.family.dtype = torch.bfloat16
        write(folder, f"{FULL}{name}-bfloat16-{rank}", train(one, range(2), family))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"]))
