"""The page's picture of who waits for whom: for each role, what its workers did with their time over the run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from opd_ray.report.charts import Slice, band_chart
from opd_ray.report.run_folder import Round
from opd_ray.report.wording import count, duration, number, percent, role_title

__all__ = ["STATES", "roles_of", "shares", "who_waits"]

STATES = {
    "busy": "busy",
    "transfer": "transfer",
    "input": "waiting for input",
    "output": "waiting for output",
}
"""What a worker's time goes into, as ``roles`` in metrics.jsonl has it, and how it is called. Stacked in this order."""
DRAWN = ("busy", "transfer", "output")
"""The background is hatched: it is what is seen of waiting for input, also in grey."""
MOST_SLICES = 160
HIGHEST = 0.94
"""Where the line of workers is when most are up: below the band's edge."""
TICKS_S = [n * unit for unit in (1, 60, 3600, 86400) for n in (1, 2, 5, 10, 15, 30) if unit < 3600 or n < 15]
MEANING = (
    "Waiting for input: nothing to do until other roles have made it. Waiting for output: all is done, until whoever "
    "takes the results asks for more. Transfer: between a request and its answer, without work."
)


def roles_of(rounds: Iterable[Round]) -> list[str]:
    """Every role whose time is known, in order of appearance."""
    return list(dict.fromkeys(role for row in rounds for role in row.roles))


def shares(uses: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The share of each of ``STATES`` in the worker-seconds of several rounds; empty where there are none."""
    totals = dict.fromkeys(STATES, 0.0)
    for use in uses:
        for state in totals:
            totals[state] += max(use.get(state, 0.0), 0.0)
    whole = sum(totals.values())
    return {state: total / whole for state, total in totals.items()} if whole > 0 else {}


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring rounds that are drawn as one piece."""

    start: float
    """Seconds in rounds before it; ``end`` with it."""
    end: float
    rounds: Sequence[Round]

    @property
    def title(self) -> str:
        first, last = self.rounds[0].index + 1, self.rounds[-1].index + 1
        return f"round {first}" if first == last else f"rounds {first} to {last}"

    def workers(self, role: str) -> float:
        """The mean number over the rounds, longer ones counting more."""
        weights = [(row.seconds["round"], row.roles.get(role, {}).get("workers", 0.0)) for row in self.rounds]
        return sum(seconds * workers for seconds, workers in weights) / sum(seconds for seconds, _ in weights)


def who_waits(rounds: Sequence[Round]) -> str:
    """A band for each role over the time in rounds; nothing where no row has ``roles``."""
    rounds = [row for row in rounds if row.seconds.get("round", 0.0) > 0]
    roles = roles_of(rounds)
    if not roles:
        return ""
    spans = _spans(rounds)
    bands = "".join(_band(role, rounds, spans) for role in roles) + _axis(spans[-1].end)
    keys = "".join(f'<li class="{state}"><i></i>{name}</li>' for state, name in reversed(STATES.items()))
    keys += '<li class="workers"><i></i>workers, where their number changes</li>'
    title = "Who waits for whom <small>of each role's workers' time, over the time in rounds</small>"
    return (
        f'<figure class="waiting"><figcaption>{title}</figcaption><div class="bands">{bands}</div>'
        f'<ul class="legend">{keys}</ul></figure><p class="note below">{MEANING}</p>'
    )


def _spans(rounds: Sequence[Round]) -> list[_Span]:
    """At most ``MOST_SLICES`` pieces, of rounds as they come."""
    least = sum(row.seconds["round"] for row in rounds) / MOST_SLICES
    spans: list[_Span] = []
    held: list[Round] = []
    start = end = 0.0
    for row in rounds:
        held.append(row)
        end += row.seconds["round"]
        if end - start >= least or row is rounds[-1]:
            spans.append(_Span(start, end, held))
            held, start = [], end
    return spans


def _band(role: str, rounds: Sequence[Round], spans: Sequence[_Span]) -> str:
    total = spans[-1].end
    workers = [span.workers(role) for span in spans]
    fewest, most = round(min(workers)), round(max(workers))
    slices = []
    for span, up in zip(spans, workers, strict=True):
        use = shares(row.roles.get(role, {}) for row in span.rounds)
        when = f"{span.title}, {duration(span.start)} to {duration(span.end)}"
        tip = f"{when}: {_said(use) or 'no workers'}; workers {number(up)}"
        slices.append(Slice(span.start / total, span.end / total, use, HIGHEST * up / (max(workers) or 1.0), tip))
    whole = shares(row.roles.get(role, {}) for row in rounds)
    label = f"{role_title(role)}: {_said(whole) or 'no workers'}"
    drawn = band_chart(slices, DRAWN, label=label, line=fewest != most)
    amount = count(most, "worker") if fewest == most else f"{fewest} to {count(most, 'worker')}"
    return (
        f'<div class="band"><div class="name">{escape(role_title(role))}<small>{amount}</small></div>'
        f'<div class="strip">{drawn}</div><div class="most"><b>{percent(whole.get("busy"))}</b> busy</div></div>'
    )


def _said(use: Mapping[str, float]) -> str:
    return ", ".join(f"{STATES[state]} {percent(share)}" for state, share in use.items())


def _axis(total: float) -> str:
    step = next((step for step in TICKS_S if step >= total / 5), total)
    ticks = [n * step for n in range(int(total / step) + 1) if (total - n * step) / total >= 0.17]
    places = "".join(
        f'<span style="left:{100 * tick / total:.2f}%">{duration(tick) if tick else "0"}</span>'
        for tick in [*ticks, total]
    )
    return f'<div class="band"><div></div><div class="axis">{places}</div></div>'
