"""The workers of an evaluation, and how its parts go through them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opd_ray import roles
from opd_ray.config import Config, RolePlacement
from opd_ray.errors import PlacementError, Stopped
from opd_ray.evaluation.parts import Part
from opd_ray.pools import make_pool, new_nonce
from opd_ray.runtime.clerk import ClerkHost
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Backend
from opd_ray.runtime.jobs import PROBE, Job, Output
from opd_ray.runtime.pool import Pool
from opd_ray.scoring import Judges, merged
from opd_ray.types import Prompt, Scored

__all__ = ["Workers", "workers"]


@dataclass(frozen=True, slots=True)
class Workers:
    """They make pictures (``method`` of a part), and score them."""

    dispatcher: Dispatcher
    pictures: Pool
    judges: Judges
    clerk: Pool | None
    """Writes pictures where those who draw them do not see the folder."""

    def carry_out(self, parts: Sequence[Part], total: int, write: Callable[[Part, Scored], None]) -> None:
        """Every part, in order; several are under way at a time, and as many are done again by whoever goes on.

        Args:
            parts: those that are left: nothing failed in the others.
            total: pictures of all parts, of which a reward may fail on a share, however often one goes on.
            write: gets each part's scores.

        Raises:
            Stopped: a reward fails on more than it may; what was scored until then is written.
        """
        limits, failed = self.judges.limits, dict.fromkeys(self.judges.limits, 0)
        ahead = self.pictures.size + 2
        flying: deque[tuple[Part, Job, tuple[Job, ...], list[Job]]] = deque()
        for number, part in enumerate(parts):
            flying.append((part, *self._begin(part)))
            while flying and (len(flying) >= ahead or number == len(parts) - 1):
                first, made, scores, written = flying.popleft()
                self.dispatcher.wait([*scores, *written])
                found = merged(scores)
                assert made.result is not None
                write(first, _without(found, made.result.value.faults))
                for name, every in found.errors.items():
                    errors = {place: text for place, text in every.items() if place not in made.result.value.faults}
                    failed[name] += len(errors)
                    if failed[name] > limits[name] * total:
                        raise Stopped(
                            f"reward {name} failed on {failed[name]} of {total} pictures, more than max_failed "
                            f"{limits[name]:g} allows; last error: {[*errors.values()][-1]}. Mend it, then run it "
                            "again to go on"
                        )

    def about(self) -> dict[str, dict[str, Any]]:
        """Reward -> how it proved itself, its files with their sha256, and the packages of its environment."""
        panels = self.judges.panels
        jobs = [Job(panel.pool, "about", (), 0, "versions of rewards", books=PROBE) for panel in panels]
        self.dispatcher.wait([self.dispatcher.submit(job) for job in jobs])
        found, proofs = {}, self.judges.proofs
        for job in jobs:
            assert job.result is not None
            weights, versions = job.result.value
            for name, files in weights.items():
                found[name] = {"proof": proofs[name], "weights": files, "packages": versions}
        return found

    def _begin(self, part: Part) -> tuple[Job, tuple[Job, ...], list[Job]]:
        """The job that makes its pictures, those that score them, and those that write them."""
        label = f"pictures of {part.model}"
        args, files = part.args, list[str]()
        if self.clerk is not None and part.method == "sample":
            args, files = (part.args[0], []), part.args[1]
        made = Job(self.pictures, part.method, args, 1, label, alike=False)
        self.dispatcher.submit(made)

        def manifest() -> Any:
            return made.result.value.manifest if made.result else None

        images, written = Output(made, 0), list[Job]()
        if files and self.clerk is not None:
            job = Job(self.clerk, "pictures", lambda: (files, manifest(), images), 0, f"writing {label}", after=(made,))
            written.append(self.dispatcher.submit(job))
        return made, self.judges.score(part.prompts, manifest, images, f"scores of {part.model}"), written


def _without(found: Scored, faults: Mapping[int, str]) -> Scored:
    """Where a picture could not be read, what was scored in its place is no score: that fails for every reward."""
    return Scored(found.scores, {name: {**found.errors.get(name, {}), **faults} for name in found.scores})


@contextmanager
def workers(
    config: Config,
    backend: Backend,
    folder: Path,
    make: Callable[[], Any],
    prompts: Sequence[Prompt],
    note: Callable[[str], None],
) -> Iterator[Workers]:
    """Start them; end them afterwards.

    Args:
        config: its rewards, and its cluster: pictures are made where rollouts would be drawn.
        backend: where workers live.
        folder: of the evaluation.
        make: the host that makes pictures, in its process.
        prompts: a few of the evaluation's, for rewards that are proven by their answering at all.
        note: is told of everything unusual.

    Raises:
        UserError: there is no room, or a reward does not work.
    """
    cluster = config.cluster
    dispatcher = Dispatcher(backend, call_timeout_s=cluster.call_timeout_s, pause_timeout_s=cluster.start_timeout_s)
    dispatcher.note, dispatcher.logs = note, folder / "logs"
    new_nonce(folder)
    pool = partial(make_pool, dispatcher, cluster, folder)
    try:
        pictures = pool("pictures", cluster.rollout, make)
        judges = roles.judges(config, dispatcher, pool, prompts)
        ships = cluster.storage == "ship" and cluster.runtime == "ray"
        clerk = pool("clerk", RolePlacement(resources={"cpu": 0}), ClerkHost, home=True) if ships else None
        lack = backend.shortage([one.spec for one in dispatcher.pools for _ in range(one.size)])
        if lack and not cluster.nodes_may_come:
            raise PlacementError(lack)
        dispatcher.wait_ready()
        yield Workers(dispatcher, pictures, judges, clerk)
    finally:
        backend.close()
