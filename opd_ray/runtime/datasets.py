"""Pairs through Ray Data: tasks read and decode ahead in the cluster; the object store holds a bounded part of it."""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata

from opd_ray.errors import PromptError
from opd_ray.pairs.order import Order
from opd_ray.pairs.windows import Reading, Row, Window

__all__ = ["rows"]

WINDOWS = 64
"""Of one data set; the next one follows it."""
BLOCK = 4 * 2**20
"""Bytes of rows that travel together."""
SHARE = 0.1
"""Of the smallest node's object store, for rows that are read ahead."""


FAILED = -1
"""The position of a row whose fault is why there are no more of them."""


class _Source(ray.data.Datasource):  # type: ignore[misc]  # an untyped library's
    """A task for each window."""

    def __init__(self, reading: Reading, tasks: list[tuple[Window, int]]) -> None:
        super().__init__()
        self._reading, self._tasks = reading, tasks

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **more: Any) -> list[ray.data.ReadTask]:
        about = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ray.data.ReadTask(partial(_blocks, self._reading, *task), about) for task in self._tasks]


def _blocks(reading: Reading, window: Window, skip: int) -> Iterator[pa.Table]:
    try:
        for row in reading.rows(window, skip):
            yield _block(row)
    except PromptError as error:  # as a row: Ray Data would write pages about it
        yield _block(Row(FAILED, "", "", b"", b"", str(error)))


def _block(row: Row) -> pa.Table:
    return pa.table({one.name: [getattr(row, one.name)] for one in fields(Row)})


def rows(order: Order, reading: Reading, decoders: int, position: int) -> Iterator[Row]:
    """What ``order.rows`` gives, read and decoded ahead by tasks that take no CPU from the run's own workers.

    Args:
        order: of the pairs.
        reading: how they become rows.
        decoders: tasks at one time.
        position: of the first row.

    Raises:
        PromptError: as ``Reading.rows``.
    """
    windows = order.windows(position)
    while True:
        tasks = [(window, max(position - window.start, 0)) for window in islice(windows, WINDOWS)]
        found = ray.data.read_datasource(
            _Source(reading, tasks), num_cpus=0, concurrency=decoders, override_num_blocks=len(tasks)
        )
        _settle(found.context)
        for block in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for row in (Row(**cells) for cells in block.to_pylist()):
                if row.position == FAILED:
                    raise PromptError(row.fault)
                yield row


def _settle(context: Any) -> None:
    nodes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=SHARE * min(nodes))
    context.target_max_block_size = BLOCK
    context.enable_progress_bars = context.print_on_execution_start = False
