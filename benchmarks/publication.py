"""How fast published weights are bound and proven by all workers of a node, against plain memcpy by as many processes.

    python benchmarks/publication.py --max 4e9 --workers 2 --repeats 5

One worker returns weights into Ray's object store, in buckets, as the learner does; several receivers on this node copy
them into parameters that are there, read these back, and compare the checksum. Then the same processes copy as many
bytes from one array of their own to another, at the same time. Both sides are timed by the processes themselves, from
the first that begins to the last that is done, in turn and several times over; the ratio is taken within each repeat.
The first delivery of a size, which meets pages of the object store that a process has not seen, is shown on its own;
the store uses its memory again from the third or fourth on, so two more are not counted. On a machine that does other
things too, look at the fastest of both sides. Below a megabyte fixed costs are all there is, so those rows show
milliseconds alone. What does not fit into memory is left out.

The last columns are the learner's: memory of its own (RssAnon, without the store's pages) that publishing takes at its
peak beyond what it had, and how long the next round waits for it, both against the size of a bucket and a copy.
"""

import argparse
import re
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch

from opd_ray.console import console
from opd_ray.digest import checksum
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.handle import Call, Done, WorkerSpec
from opd_ray.runtime.hosts import LearnerHost
from opd_ray.storage.packing import BUCKET, Flat, bind_into, manifest_of
from opd_ray.types import WeightVersion

SIZES = (1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 4e9)
LARGEST_TENSOR = 16_000_000
WARM_UP = 3
TIMEOUT_S = 600
LEAD_S = 0.2
"""From asking the receivers until all of them begin: longer than Ray needs to hand the call over."""

Span = tuple[float, float]
"""Wall-clock times of beginning and end."""


def shapes(size: int) -> list[int]:
    """Numbers (float32) of each tensor of weights of ``size`` bytes."""
    whole, rest = divmod(size, LARGEST_TENSOR)
    return [LARGEST_TENSOR // 4] * whole + ([rest // 4] if rest else [])


class Publisher:
    """The host of a learner that has these weights and nothing else."""

    def make(self, size: int) -> Done:
        """New weights; answers in how many arrays they will be published."""
        generator = torch.Generator().manual_seed(0)
        weights = {f"w{n:04}": torch.randn(k, generator=generator) for n, k in enumerate(shapes(size))}
        learner: Any = SimpleNamespace(
            family=SimpleNamespace(dtype=torch.float32),
            engine=SimpleNamespace(rank=0),
            layout=lambda: weights,
            gather=lambda names, average: ((name, weights[name]) for name in names),
            probe=lambda average: torch.zeros(1),
        )
        self.host = LearnerHost(lambda: learner)
        return Done(self.host.ready().value.buckets, 0.0, 0)

    def publish(self, bucket: int) -> tuple[Flat, Done]:
        """An array, and with the last one the record."""
        if bucket == 0:
            self.peak, self.base, self.stop = 0.0, own_memory(), threading.Event()
            threading.Thread(target=self._look, daemon=True).start()
        return self.host.publish(WeightVersion(0, 0, 0), False, bucket)

    def _look(self) -> None:
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, own_memory() - self.base)

    def peaked(self) -> Done:
        """Bytes of its own memory that publishing took at most."""
        self.stop.set()
        return Done(max(self.peak, own_memory() - self.base), 0.0, 0)


def own_memory() -> float:
    """Bytes of this process that are neither a file's nor the object store's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return float(found[1]) * 1024


class Receiver:
    """Stands for a rollout worker."""

    def make(self, size: int) -> Done:
        """Parameters to bind into, and two arrays to copy between; all of them touched."""
        self.parameters = {f"w{n:04}": torch.zeros(k).fill_(1) for n, k in enumerate(shapes(size))}
        self.source, self.target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        return Done(None, 0.0, 0)

    def bind(self, sent: str, begin: float, *flats: Flat) -> Done:
        """Copy, bind, read back, compare."""
        start = _wait(begin)
        manifests = [manifest_of(flat) for flat in flats]
        parts = (flat[: manifest.nbytes] for flat, manifest in zip(flats, manifests, strict=True))
        bind_into(self.parameters, parts, [manifest.without("probe") for manifest in manifests])
        if checksum(self.parameters) != sent:
            raise RuntimeError("the weights that arrived are not those that were sent")
        return Done((start, time.time()), 0.0, 0)

    def copy(self, begin: float) -> Done:
        """Plain memcpy."""
        start = _wait(begin)
        np.copyto(self.target, self.source)
        return Done((start, time.time()), 0.0, 0)


def _wait(begin: float) -> float:
    while (now := time.time()) < begin:
        pass
    return now


@dataclass(frozen=True, slots=True)
class Repeat:
    """Seconds of one repeat."""

    bound: float
    copied: float
    delivered: float
    """From the call that publishes to the last acknowledgement, the lead left out."""
    published: float
    """Until the learner is free again."""
    peak: float
    """Bytes of the learner's own memory beside the weights."""


class Node:
    """A publisher and the receivers."""

    def __init__(self, backend: RayBackend, workers: int) -> None:
        self.backend = backend
        self.publisher = backend.start(WorkerSpec("publisher", Publisher, 1, {"cpu": 0}), "publisher")
        spec = WorkerSpec("receiver", Receiver, 1, {"cpu": 0})
        self.receivers = [backend.start(spec, f"receiver-{number}") for number in range(workers)]

    def prepare(self, size: int) -> int:
        """Make weights and parameters; how many arrays the weights are."""
        self._all([receiver.call("make", size, bulk=0) for receiver in self.receivers])
        (count,) = self._all([self.publisher.call("make", size, bulk=0)])
        return int(count)

    def repeat(self, arrays: int) -> Repeat:
        """Publish, bind and prove everywhere; then copy as much."""
        start = time.time()
        published = [self.publisher.call("publish", bucket, bulk=1) for bucket in range(arrays)]
        sent = self._all(published)[-1].checksum
        free = time.time() - start
        (peak,) = self._all([self.publisher.call("peaked", bulk=0)])
        flats = [call.bulk[0] for call in published]
        begin = time.time() + LEAD_S
        calls = [receiver.call("bind", sent, begin, *flats, bulk=0) for receiver in self.receivers]
        bound = self._all(calls)
        end = max(span[1] for span in bound)
        begin = time.time() + LEAD_S
        copied = self._all([receiver.call("copy", begin, bulk=0) for receiver in self.receivers])
        return Repeat(_seconds(bound), _seconds(copied), end - start - LEAD_S, free, peak)

    def _all(self, calls: Sequence[Call]) -> list[Any]:
        waiting, deadline = [call.done for call in calls], time.monotonic() + TIMEOUT_S
        while waiting:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer in {TIMEOUT_S} s")
            done = self.backend.wait(waiting, 0.05)
            waiting = [ref for ref in waiting if ref not in done]
        return [self.backend.result(call.done).value for call in calls]


def _seconds(spans: Sequence[Span]) -> float:
    return max(end for _, end in spans) - min(start for start, _ in spans)


def needed(size: float, workers: int) -> float:
    """Bytes: weights, their packed copy, two versions in the object store; three arrays in each receiver."""
    return (4 + 3 * workers) * size


def spread(values: Sequence[float], form: str) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def row(size: float, workers: int, arrays: int, first: Repeat, repeats: Sequence[Repeat]) -> str:
    """One line of the table."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if size >= u)
    delivered = spread([1e3 * one.delivered for one in repeats], ".3g")
    binding = spread([1e3 * one.bound for one in repeats], ".3g")
    cells = [f"{size / unit:g} {name}", str(arrays), delivered, binding]
    if size < 1e6:
        cells += [""] * 7
    else:
        total = workers * size / 1e9
        cells.append(spread([total / one.bound for one in repeats], ".1f"))
        cells.append(spread([total / one.copied for one in repeats], ".1f"))
        cells.append(spread([one.copied / one.bound for one in repeats], ".2f"))
        cells.append(f"{min(one.copied for one in repeats) / min(one.bound for one in repeats):.2f}")
        cells.append(f"{first.copied / first.bound:.2f}")
        cells.append(f"{max(one.peak for one in repeats) / min(size, BUCKET):.2f}")
        cells.append(spread([one.published for one in repeats], ".3g"))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Go through the sizes and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max", type=float, default=1e9, help="bytes of the largest weights")
    parser.add_argument("--workers", type=int, default=2, help="receivers on this node")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    free = 0.85 * psutil.virtual_memory().available
    sizes = [size for size in SIZES if size <= args.max and needed(size, args.workers) <= free]
    backend = RayBackend(object_store_mb=int(2.2 * max(sizes) / 2**20) + 200)
    try:
        node = Node(backend, args.workers)
        console.print(f"{args.workers} receivers, {args.repeats} repeats, arrays of at most {BUCKET / 1e6:g} MB\n")
        console.print(
            "| weights | arrays | published until all acknowledged, ms | bound and proven, ms | GB/s of the node "
            "| memcpy, GB/s | ratio | ratio of the fastest | ratio, first delivery "
            "| learner's own memory at its peak, buckets | learner busy, s |\n"
            f"|{'---|' * 11}",
            soft_wrap=True,
            markup=False,
        )
        for size in sizes:
            arrays = node.prepare(int(size))
            first, *repeats = [node.repeat(arrays) for _ in range(WARM_UP + args.repeats)]
            repeats = repeats[WARM_UP - 1 :]
            console.print(row(size, args.workers, arrays, first, repeats), soft_wrap=True, markup=False)
    finally:
        backend.close()
    for size in SIZES:
        if size <= args.max and size not in sizes:
            short = f"{needed(size, args.workers) / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            console.print(f"\n{size / 1e9:g} GB was left out: it takes {short}", soft_wrap=True)


if __name__ == "__main__":
    main()
