"""What goes through the driver: bytes of records a sample, and the driver's memory over a thousand rounds.

    python benchmarks/driver.py --rounds 1000

The real run: composition root, loop, source of experience with its checks, learner group, metrics and status file, on
real Ray. Its workers compute nothing and answer at once, with the records of Stable Diffusion 3.5 medium at 512 px: all
its conditioning, prompts of 100 characters, rounds of 72 images, six an item. Counted are the pickled records that the
driver fetches and the pickled arguments that it sends, a reference as its 28 bytes.
"""

import argparse
import io
import pickle
import resource
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fixed_time import LORA_BYTES, Ack
from rich.console import Console

from opd_ray import build as composition
from opd_ray import loop, roles
from opd_ray.actors.teacher import TeacherFacts
from opd_ray.console import console
from opd_ray.learners import UpdateReport
from opd_ray.recipes import load
from opd_ray.report.live import Live
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.handle import Call, Done, Handle, RankFacts, Ref, WorkerSpec
from opd_ray.runtime.handle import Weights as Published
from opd_ray.runtime.hosts import Drawn
from opd_ray.storage.packing import AnswerRecord, Entry, Manifest, TrajectoryRecord
from opd_ray.types import WeightVersion, WorkItem

TASKS = ("compose", "text", "look")
STEPS = 10
LATENT = (16, 64, 64)
COND = {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}
FLAT = np.zeros(1000, dtype=np.uint8)
REF_BYTES = 28


def manifest(shapes: dict[str, tuple[int, ...]]) -> Manifest:
    """As packing tensors of these shapes makes it."""
    entries, end = [], 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        entries.append(Entry(name, "float32", shape, end, size))
        end += size
    return Manifest(tuple(entries), end)


class Rollout:
    """Answers at once."""

    def ready(self) -> Done:
        return Done("bf16", 0.0, 0)

    def bind(self, weights: Published, flat: Any) -> Done:
        return Done(Ack(weights.version, 384, weights.sha256), 0.0, 0)

    def draw(self, item: WorkItem, version: WeightVersion, sha256: str, last: int, images: bool, *more: Any) -> Any:
        rows = len(item.prompts)
        shapes = {"sigmas": (STEPS + 1,), "latents": (rows, last + 1, *LATENT)}
        shapes |= {f"cond/{name}": (rows, *shape) for name, shape in COND.items()}
        shapes |= {f"uncond/{name}": (1, *shape) for name, shape in COND.items()}
        return FLAT, FLAT, Done(Drawn(TrajectoryRecord(item, version, manifest(shapes)), None), 0.001, rows)


class Teacher:
    """Answers at once."""

    def ready(self) -> Done:
        return Done({name: TeacherFacts(name, "0" * 64, 4.5, "bf16", None, False) for name in TASKS}, 0.0, 0)

    def score(self, records: Sequence[TrajectoryRecord], teacher: str, *flats: Any) -> Any:
        item = records[0].item
        shapes = {"velocity": (len(item.prompts), len(item.steps), *LATENT)}
        record = AnswerRecord(teacher, item.steps, manifest(shapes))
        return FLAT, Done(record, 0.001, len(item.prompts), holds=TASKS)


class Learner:
    """Answers at once, with the numbers of an update."""

    def __init__(self) -> None:
        self.flat, self.items = np.zeros(LORA_BYTES, dtype=np.uint8), list[WorkItem]()

    def ready(self) -> Done:
        return Done(RankFacts("bf16"), 0.0, 0)

    def begin(self, items: Sequence[WorkItem]) -> Done:
        self.items = list(items)
        return Done(None, 0.0, 0)

    def take(self, *args: Any) -> Done:
        return Done(None, 0.001, 1)

    def observe(self, scores: Any) -> Done:
        return Done(None, 0.0, 0)

    def update(self, update: int) -> Done:
        count = Counter(item.task for item in self.items)
        steps = {item.task: {step: {"gap": (1.0, 1)} for step in item.steps} for item in self.items}
        return Done(UpdateReport(0.1, {task: (0.1, n) for task, n in count.items()}, steps, 1.0, 1e-3), 0.001, 0)

    def finish_round(self, round: int) -> Done:
        return Done(None, 0.0, 0)

    def publish(self, version: WeightVersion, average: bool, bucket: int) -> Any:
        return self.flat, Done(Published(version, "0" * 64), 0.001, 0)

    def save(self, *args: Any) -> Done:
        return Done("nowhere", 0.0, 0)


class Counting(RayBackend):
    """Counts what is sent and fetched."""

    def __init__(self, *, object_store_mb: int) -> None:
        super().__init__(object_store_mb=object_store_mb)
        self.bytes = Counter[str]()
        self.methods: dict[Ref, str] = {}

    def start(self, spec: WorkerSpec, name: str) -> Handle:
        return CountingHandle(super().start(spec, name), self)

    def start_group(
        self, specs: Sequence[WorkerSpec], timeout_s: float, idle: Callable[[], None] = lambda: None
    ) -> list[Handle]:
        return [CountingHandle(handle, self) for handle in super().start_group(specs, timeout_s, idle)]

    def result(self, ref: Ref) -> Done:
        done = super().result(ref)
        self.bytes[f"fetched, {self.methods.pop(ref, 'beat')}"] += size(done)
        return done


class CountingHandle:
    """Counts what is sent."""

    def __init__(self, handle: Handle, backend: Counting) -> None:
        self.handle, self.backend, self.name = handle, backend, handle.name

    def call(self, method: str, *args: Any, bulk: int) -> Call:
        call = self.handle.call(method, *args, bulk=bulk)
        self.backend.methods[call.done] = method
        self.backend.bytes[f"sent, {method}"] += size(args)
        return call

    def beat(self, *, stack: bool = False) -> Call | None:
        return self.handle.beat(stack=stack)

    def kill(self) -> None:
        self.handle.kill()


class Sizer(pickle.Pickler):
    """References count as what they are."""

    def persistent_id(self, found: Any) -> bytes | None:
        return b"0" * REF_BYTES if type(found).__name__ == "ObjectRef" else None


def size(found: Any) -> int:
    """Bytes of it, pickled."""
    buffer = io.BytesIO()
    Sizer(buffer, protocol=5).dump(found)
    return buffer.tell()


def resident_mb() -> float:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class Watch(Live):
    """Looks at the driver's memory now and then."""

    def __init__(self, rounds: int, every: int) -> None:
        super().__init__(rounds, "driver", console=Console(file=io.StringIO()))
        self.every, self.memory = every, list[tuple[int, float]]()

    def round(self, row: Any) -> None:
        number = row["round"] + 1
        if number % self.every == 0:
            self.memory.append((number, resident_mb()))
            console.print(f"round {number}: {self.memory[-1][1]:.1f} MB", highlight=False)


def measure(rounds: int, every: int, folder: Path) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Bytes a sample by kind, and megabytes by round."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{number} {'a photo of many things ' * 5}"[:100] + "\n" for number in range(500)))
    config = load(
        "demo",
        [
            "name=driver",
            f"rounds={rounds}",
            f"sampling.steps={STEPS}",
            "evaluation.images_per_task=0",
            "batch.images_per_task=24",
            "batch.item_size=6",
            f"checkpoint.every={rounds}",
            "cluster.max_staleness=1",
            *(f"prompts.train.{task}={prompts}" for task in TASKS),
        ],
    )
    # The run is built as always, but for what its workers hold.
    roles.rollout, roles.teacher, roles.learner = (lambda *_, host=host: host for host in (Rollout, Teacher, Learner))
    made: list[Counting] = []
    composition.make_backend = lambda config: made.append(Counting(object_store_mb=500)) or made[0]
    live = Watch(rounds, every)
    with composition.build(config, folder / "run", live) as run:
        loop.train(run)
    samples = rounds * len(TASKS) * config.batch.images_per_task
    return {name: count / samples for name, count in made[0].bytes.most_common()}, live.memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, memory = measure(args.rounds, args.every, Path(folder))
    console.print(f"{sum(found.values()) / 1000:.2f} KB a sample: ", highlight=False)
    for name, count in found.items():
        console.print(f"  {name}: {count:.0f} bytes", highlight=False)
    if len(memory) > 2:
        rounds, megabytes = zip(*memory[1:], strict=True)
        slope = statistics.linear_regression(rounds, megabytes).slope
        console.print(f"memory: {1024 * slope:.1f} KB a round after round {rounds[0]}", highlight=False)


if __name__ == "__main__":
    main()
