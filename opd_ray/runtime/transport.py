"""How published weights get from the learner ranks to the workers that draw. Nothing else knows the way."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from opd_ray.runtime.handle import Call, Done, Handle, Weights
from opd_ray.types import WeightVersion

__all__ = ["ObjectStore", "Transport"]


class Transport(Protocol):
    """The way that weights take. Whatever it is, a receiver reads back what it bound and acknowledges it."""

    def publish(self, ranks: Sequence[Handle], version: WeightVersion, buckets: int, *, average: bool) -> list[Call]:
        """Have the ranks give their weights; the last of these calls answers with the record."""
        ...

    def published(self, calls: Sequence[Call], answers: Sequence[Done]) -> Weights:
        """What is handed around of them, once all those calls are answered."""
        ...

    def deliver(self, weights: Weights, worker: Handle) -> Call:
        """Have a worker take and prove them; it answers with its acknowledgement."""
        ...


class ObjectStore:
    """Through Ray's object store: rank 0 returns one array a bucket, and workers are given references to them.

    One bucket is packed after the other, so that the rank never holds a second copy of the whole.
    """

    def publish(self, ranks: Sequence[Handle], version: WeightVersion, buckets: int, *, average: bool) -> list[Call]:
        """All buckets are asked for at once: the rank packs one after the other, and nothing comes in between."""
        return [ranks[0].call("publish", version, average, number, bulk=1) for number in range(buckets)]

    def published(self, calls: Sequence[Call], answers: Sequence[Done]) -> Weights:
        """The record with references to the arrays."""
        record: Weights = answers[-1].value
        return replace(record, flats=tuple(call.bulk[0] for call in calls))

    def deliver(self, weights: Weights, worker: Handle) -> Call:
        """The worker copies them from its node's store into its parameters."""
        return worker.call("bind", replace(weights, flats=()), *weights.flats, bulk=0)
