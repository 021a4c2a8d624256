"""What a cluster of some size is good for: the best split, what it gives, and the curve over sizes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from opd_ray.config import Config
from opd_ray.planning.rates import Rates
from opd_ray.planning.schedule import limits, round_seconds, throughput
from opd_ray.planning.split import Demand, Split, best_split, curve, gains
from opd_ray.report.charts import Series, line_chart

__all__ = ["Outlook", "outlook", "picture"]

STYLE = """
.grid line{stroke:#e3e3df}text{fill:#5d636e;font:12px system-ui,"Liberation Sans",Arial,sans-serif}
.title{fill:#1b1d22;font-size:15px;font-weight:600}polyline{fill:none;stroke:currentColor;stroke-width:2}
.level{stroke-dasharray:5 5}circle{fill:currentColor}.c0{color:#2456d6}.c7{color:#69707d}
"""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of one run on some number of cards or worker slots."""

    unit: str
    """``GPU``, or ``worker slot`` where no role asks for a card."""
    total: int
    staleness: int
    split: Split
    round_s: float
    """Seconds of a round."""
    publish_s: float
    """Of each round, in which the learner publishes; in a strictly on-policy run nobody draws meanwhile."""
    limits: Mapping[str, float]
    """Role -> samples a second that it could work off if it never had to wait."""
    one_more: Mapping[str, float]
    """Role -> what one more worker of it would multiply the throughput by."""
    ahead: float
    """What one more round of staleness would multiply it by."""
    curve: Sequence[tuple[int, Split]]
    """Units -> the best split, for powers of two and ``total``; sizes without room for every role are left out."""

    def data(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self)
        found["curve"] = [asdict(split) | {"total": size} for size, split in self.curve]
        return found


def outlook(config: Config, rates: Rates, total: int) -> Outlook:
    """Divide so many cards, or worker slots where no role asks for a card.

    Raises:
        PlacementError: one worker of each role does not fit.
    """
    demand, staleness = Demand.of(config, rates), config.cluster.max_staleness
    best_split(rates, demand, total, staleness)  # refused before the curve is worked out
    sizes = [2**power for power in range(int(math.log2(total)) + 1)]
    found = curve(rates, demand, [*sizes, total], staleness)
    split = found[-1][1]
    return Outlook(
        unit=demand.unit,
        total=total,
        staleness=staleness,
        split=split,
        round_s=round_seconds(rates, split.workers, staleness),
        publish_s=rates.publish,
        limits=limits(rates, split.workers),
        one_more=gains(rates, split.workers, staleness),
        ahead=throughput(rates, split.workers, staleness + 1) / split.samples_per_s,
        curve=found,
    )


def picture(found: Outlook, title: str) -> str:
    """The curve as an SVG file, beside what it would be in proportion to its first point."""
    points = tuple((float(size), split.samples_per_s) for size, split in found.curve)
    first, last = points[0], points[-1]
    proportional = (first, (last[0], first[1] * last[0] / first[0]))
    lines = [Series("in proportion", 7, proportional), Series("best split", 0, points)]
    chart = line_chart(lines, label="predicted samples a second over size", dots=True, unit=f"{found.unit}s")
    box = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 300" font-size="12"'
    return (
        f'<svg {box}><style>{STYLE}</style><rect width="480" height="300" fill="#fff"/>'
        f'<text class="title" x="10" y="22">{escape(title)}</text>'
        f'<text x="10" y="42">samples/s of the best split; grey: in proportion to the first point</text>'
        f'<svg y="50" width="480" height="230">{chart}</svg>'
        f'<text x="266" y="292" text-anchor="middle">{found.unit}s</text></svg>\n'
    )
