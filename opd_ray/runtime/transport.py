"""How published weights get from the learner ranks to the workers that draw. Nothing else knows the way."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from opd_ray.runtime.handle import Call, Done, Handle, Weights
from opd_ray.types import WeightVersion

__all__ = ["ObjectStore", "Transport"]


class Transport(Protocol):
    """The way that weights take. Whatever it is, a receiver reads back what it bound and acknowledges it."""

    def publish(
        self, ranks: Sequence[Handle], version: WeightVersion, buckets: int, *, average: bool
    ) -> list[list[Call]]:
        """Have these ranks give their weights: calls by rank; the last of the first rank's answers with the record."""
        ...

    def published(self, calls: Sequence[Call], answers: Sequence[Done]) -> Weights:
        """What is handed around of them, once the first rank's calls are answered."""
        ...

    def deliver(self, weights: Weights, worker: Handle) -> Call:
        """Have a worker take and prove them; it answers with its acknowledgement."""
        ...


class ObjectStore:
    """Through Ray's object store: rank 0 returns one array a bucket, and workers are given references to them.

    One bucket is packed after the other, so that the rank never holds a second copy of the whole.
    """

    def publish(
        self, ranks: Sequence[Handle], version: WeightVersion, buckets: int, *, average: bool
    ) -> list[list[Call]]:
        """All buckets are asked for at once: a rank packs one after the other, and nothing comes in between.

        Where each rank holds a part of every tensor, all of them are asked, since gathering takes all.
        """
        return [[rank.call("publish", version, average, number, bulk=1) for number in range(buckets)] for rank in ranks]

    def published(self, calls: Sequence[Call], answers: Sequence[Done]) -> Weights:
        """The record with references to the arrays."""
        record: Weights = answers[-1].value
        return replace(record, flats=tuple(call.bulk[0] for call in calls))

    def deliver(self, weights: Weights, worker: Handle) -> Call:
        """The worker copies them from its node's store into its parameters."""
        return worker.call("bind", replace(weights, flats=()), *weights.flats, bulk=0)
