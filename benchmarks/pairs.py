"""Pairs: how fast pictures become latents through the pipeline and in plain Python, and memory over much data.

    python benchmarks/pairs.py --pairs 512 --repeats 3

A Parquet file in Pick-a-Pic v2's columns is written, several times as large as the object store, with JPEGs of noise
at the size that is asked for. In one run and in turns, each repeat reads the same pairs in both ways: `python` reads
row groups, decodes, resizes and encodes one item after the other in one process; `pipeline` is the reader of a run,
whose pictures are read and decoded by Ray Data's tasks meanwhile. Each turn begins with nothing read ahead, and the
time to its first item is told apart. Then rows at the JPEGs' full size go through the store, without a model, and the
resident memory of the reader, the object store in use and what was spilled are told.
"""

import argparse
import io
import statistics
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image
from rich.table import Table

from opd_ray.actors.pairs import PairsActor
from opd_ray.config import ModelConfig, PairsConfig
from opd_ray.console import console
from opd_ray.models.base import load_family
from opd_ray.pairs.index import index_pairs
from opd_ray.pairs.order import Order
from opd_ray.pairs.windows import Reading
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.process import _memory_mb


def write(path: Path, pairs: int, edge: int, group: int) -> None:
    """Smooth noise, which a JPEG holds at about the size of a photograph's."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema()) as writer:
        for start in range(0, pairs, group):
            rows = range(start, min(start + group, pairs))
            pictures = [[picture(rng, edge) for _ in rows] for _ in range(2)]
            ones = [1.0] * len(rows)
            captions = [f"a picture of number {row}" for row in rows]
            writer.write_table(pa.table([*pictures, ones, [0.0] * len(rows), captions], schema=schema()))


def schema() -> pa.Schema:
    kinds = [pa.binary(), pa.binary(), pa.float64(), pa.float64(), pa.string()]
    return pa.schema(list(zip(("jpg_0", "jpg_1", "label_0", "label_1", "caption"), kinds, strict=True)))


def picture(rng: np.random.Generator, edge: int) -> bytes:
    file = io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (edge // 4, edge // 4, 3), dtype=np.uint8))
    coarse.resize((edge, edge), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


class Reader:
    """A worker process that reads items."""

    def __init__(self, path: str, model: str, size: int, window: int, decoders: int) -> None:
        self.order = order = Order(index_pairs(PairsConfig(files=(path,))), 0, window)
        self.rows = None
        self.family = load_family(ModelConfig(path=model), text=True, image=True)

        def rows(side: int):
            if not decoders:
                return partial(order.rows, Reading(side))
            from opd_ray.runtime import datasets

            return partial(datasets.rows, order, Reading(side), decoders)

        self.actor = PairsActor(self.family, rows, size=size, ahead=window)

    def read(self, first: int, items: int) -> tuple[float, float]:
        """Seconds for the first of so many items in order, and for the others."""
        times = [time.perf_counter()]
        for number in range(first, first + items):
            self.actor.read(number)
            times.append(time.perf_counter())
        self.actor._rows, self.actor._next = iter(()), None  # nothing reads ahead while others are measured
        return times[1] - times[0], times[-1] - times[1]

    def through(self, edge: int, decoders: int, first: int, count: int) -> None:
        """Read so many rows at full size, as fast as they come; nothing is encoded."""
        from opd_ray.runtime import datasets

        if self.rows is None:
            self.rows = datasets.rows(self.order, Reading(edge), decoders, first)
        for _ in islice(self.rows, count):
            pass

    def memory(self) -> float:
        """MB that are resident."""
        return _memory_mb()


def ask(reader, method: str, *args):
    return ray.get(getattr(reader, method).remote(*args), timeout=1800)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--edge", type=int, default=512, help="of a JPEG, in pixels")
    parser.add_argument("--model", default="world")
    parser.add_argument("--item-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store-mb", type=int, default=100)
    parser.add_argument("--decoders", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        write(path, args.pairs, args.edge, 32)
        console.print(f"{args.pairs} pairs, {path.stat().st_size / 2**20:.0f} MB; object store {args.store_mb} MB")
        backend = RayBackend(object_store_mb=args.store_mb)
        try:
            measure(args, str(path), backend)
        finally:
            backend.close()


def measure(args: argparse.Namespace, path: str, backend: RayBackend) -> None:
    remote = ray.remote(num_cpus=0)(Reader)
    kinds = {"python": 0, "pipeline": args.decoders}
    readers = {name: remote.remote(path, args.model, args.item_size, 64, count) for name, count in kinds.items()}
    items = args.pairs // args.item_size
    part = items // args.repeats
    rates: dict[str, list[float]] = {name: [] for name in readers}
    firsts: dict[str, list[float]] = {name: [] for name in readers}
    for reader in readers.values():
        ask(reader, "read", 0, 1)  # everything is loaded
    for repeat in range(args.repeats):
        for name, reader in readers.items():
            first, rest = ask(reader, "read", repeat * part, part)
            firsts[name].append(first)
            rates[name].append((part - 1) * args.item_size / rest)
    table = Table("way", "s to the first item", "pairs/s after it, median", "of the repeats")
    for name, found in rates.items():
        spread = ", ".join(f"{rate:.1f}" for rate in found)
        table.add_row(name, f"{statistics.median(firsts[name]):.1f}", f"{statistics.median(found):.1f}", spread)
    console.print(table)
    flow(args, readers["pipeline"], backend)


def flow(args: argparse.Namespace, reader, backend: RayBackend) -> None:
    """Rows of several times the store's size."""
    table = Table("pairs through", "MB decoded", "reader MB", "store MB at most", "spilled MB")
    part = args.pairs // 4
    for step in range(1, 11):
        under_way, most = reader.through.remote(args.edge, args.decoders, 0, part), 0
        while not ray.wait([under_way], timeout=0.5, fetch_local=False)[0]:
            most = max(most, backend.object_store().used)
        decoded = step * part * 2 * 3 * args.edge**2
        told = (decoded, ask(reader, "memory") * 2**20, most, backend.object_store().spilled)
        table.add_row(str(step * part), *(f"{value / 2**20:.0f}" for value in told))
    console.print(table)


if __name__ == "__main__":
    main()
