"""The live view of a run: a panel that redraws itself on a terminal, plain lines anywhere else.

It is called from the loop and must never stop it: a display that fails turns itself off.
"""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.errors import ConsoleError
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from opd_ray.report.run_folder import Round
from opd_ray.report.waiting import STATES, roles_of, shares
from opd_ray.report.wording import duration, number, percent

__all__ = ["Live"]

PARTS = {"wait": "waiting", "update": "updating", "publish": "publishing", "checkpoint": "saving"}
DISPLAY_ERRORS = (
    ArithmeticError,
    AttributeError,
    ConsoleError,
    LookupError,
    OSError,
    RuntimeError,
    SystemExit,  # rich's answer to a closed pipe
    TypeError,
    ValueError,
)
PACE_ROUNDS = 20
"""The pace is the mean of so many last rounds, as is who waits: both follow workers that come and go."""
LEAST_WAIT = 0.05
"""Shares of a role's time below this are not worth a word."""

WITHIN_EVERY_S = 60.0
"""Without a screen: how often a long round says how far it is."""


class Live:
    """What the loop shows while it runs.

    ``with Live(80, "demo") as live: live.phase("starting 3 workers"); live.round(row)``
    """

    def __init__(
        self,
        total_rounds: int,
        title: str,
        start_round: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        line_every_s: float = 5.0,
    ) -> None:
        """``start_round``: where a resumed run begins. ``line_every_s``: for plain output."""
        self.console = console or Console(stderr=True)
        self._total, self._title, self._done = total_rounds, title, start_round
        self._clock, self._line_every_s = clock, line_every_s
        self._phase = ""
        self._phase_since = self._started = clock()
        self._first: dict[str, float] = {}
        self._first_scores: dict[str, float] = {}
        self._last: Round | None = None
        self._spent: dict[str, float] = {}
        self._ends: deque[float] = deque(maxlen=PACE_ROUNDS + 1)
        self._recent: deque[Round] = deque(maxlen=PACE_ROUNDS)
        self._line_at: float | None = None
        self._told_at = clock()
        self._unprinted = False
        self._broken = False
        self._screen: RichLive | None = None
        modern = self.console.encoding.startswith("utf")
        self._spinner = Spinner("dots" if modern else "line")
        self._arrow = "→" if modern else "->"

    def __enter__(self) -> "Live":
        with self._safely():
            if self.console.is_terminal and not self.console.is_dumb_terminal:
                self._screen = RichLive(get_renderable=self._render, console=self.console, refresh_per_second=4)
                self._screen.start()
            else:
                rounds = f"rounds {self._done + 1} to {self._total}"
                self._print(f"{self._title}: {rounds if self._done < self._total else 'no rounds left'}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._safely():
            self._phase = ""
            if self._screen is not None:
                self._screen.stop()
            elif self._unprinted:
                self._print(self._line())

    def begin(self, round: int) -> None:
        """The rounds start, or go on, from here; whatever came before was preparation."""
        with self._safely():
            self._done, self._phase = round, ""
            self._ends.clear()
            self._started = self._clock()

    def phase(self, text: str) -> None:
        """What goes on outside the rounds: starting workers, evaluating, ending."""
        with self._safely():
            self._phase, self._phase_since = text, self._clock()
            if self._screen is None and text:
                self._print(text)

    def within(self, done: int, total: int) -> None:
        """How far a round's work is; without a screen it is told once a minute."""
        with self._safely():
            text = f"round {self._done + 1}: {done} of {total} pieces of work"
            if self._screen is not None:
                if self._phase != text:
                    self._phase, self._phase_since = text, self._clock()
            elif self._clock() - self._told_at >= WITHIN_EVERY_S:
                self._told_at = self._clock()
                self._print(text)

    def note(self, text: str) -> None:
        """One line that stays: a worker was replaced, a checkpoint was written."""
        with self._safely():
            self._print(text)

    def round(self, row: Mapping[str, Any]) -> None:
        """A finished round, as its row of metrics.jsonl."""
        with self._safely():
            self._take(Round.read(row))
            self._told_at = self._clock()
            if self._screen is None:
                now = self._clock()
                due = self._line_at is None or now - self._line_at >= self._line_every_s
                self._unprinted = True
                if due or self._done >= self._total:
                    self._line_at, self._unprinted = now, False
                    self._print(self._line())

    @property
    def seconds_per_round(self) -> float | None:
        """From end to end of the last rounds, so that checkpoints and evaluations count too."""
        if len(self._ends) > 1:
            return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return self._last.seconds.get("round") if self._last else None

    @property
    def seconds_left(self) -> float | None:
        """The rounds that are left at the present pace, less the time since the last one ended."""
        pace = self.seconds_per_round
        if pace is None or not self._ends:
            return None
        since = min(self._clock() - self._ends[-1], pace)
        return max(0.0, (self._total - self._done) * pace - since)

    def _take(self, row: Round) -> None:
        self._last, self._done, self._phase = row, row.index + 1, ""
        self._ends.append(self._clock())
        self._recent.append(row)
        for task, loss in row.task_loss.items():
            self._first.setdefault(task, loss)
        for reward, mean in row.scores.items():
            self._first_scores.setdefault(reward, mean)
        for part, seconds in row.seconds.items():
            self._spent[part] = self._spent.get(part, 0.0) + seconds

    @contextlib.contextmanager
    def _safely(self) -> Iterator[None]:
        """No display error reaches the loop; the first one turns the display off."""
        if self._broken:
            yield
            return
        try:
            yield
        except DISPLAY_ERRORS as error:
            self._broken = True
            with contextlib.suppress(*DISPLAY_ERRORS):
                if self._screen is not None:
                    self._screen.stop()
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"the live view is off ({type(error).__name__}); the run goes on\n")

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _pace(self) -> str:
        pace, left = self.seconds_per_round, self.seconds_left
        if pace is None:
            return ""
        speed = f"{duration(pace)}/round" if pace >= 1 else f"{1 / pace:.1f} rounds/s"
        if self._done >= self._total:
            return f"{speed}, {duration(self._clock() - self._started)} in all"
        return f"{speed}, {duration(left)} left"

    def _losses(self) -> list[tuple[str, str]]:
        return [] if self._last is None else self._changes(self._first, self._last.task_loss)

    def _rewards(self) -> list[tuple[str, str]]:
        """Means of what was drawn to be learned from, where rewards score it."""
        return [] if self._last is None else self._changes(self._first_scores, self._last.scores)

    def _changes(self, first: Mapping[str, float], last: Mapping[str, float]) -> list[tuple[str, str]]:
        return [(name, f"{number(first[name])} {self._arrow} {number(value)}") for name, value in last.items()]

    def _shares(self) -> str:
        """Of all rounds so far; the parts that hardly count are left out."""
        whole = max(self._spent.get("round", 0.0), sum(self._spent.get(part, 0.0) for part in PARTS))
        if not whole:
            return ""
        shares = {name: self._spent.get(part, 0.0) / whole for part, name in PARTS.items()}
        return ", ".join(f"{percent(share)} {name}" for name, share in shares.items() if share >= 0.005)

    def _roles(self) -> list[tuple[float, str]]:
        """For each role how busy its workers were in the last rounds, and that with what else took most of it."""
        found = []
        for role in roles_of(self._recent):
            spent = shares(row.roles.get(role, {}) for row in self._recent)
            if spent:
                busy, name = spent.pop("busy"), role.removeprefix("teacher.")
                most = max(spent, key=spent.__getitem__)
                other = f", {percent(spent[most])} {STATES[most]}" if spent[most] >= LEAST_WAIT else ""
                found.append((busy, f"{name} {percent(busy)} busy{other}"))
        return found

    def _busiest(self) -> str:
        """For a line: the role that the others wait for, if any do."""
        return max(self._roles(), default=(0.0, ""))[1]

    def _weights(self) -> str:
        if self._last is None:
            return ""
        stale = int(self._last.values.get("staleness", 0))
        return f"{self._last.weight_version}, staleness {stale}"

    def _line(self) -> str:
        losses, rewards = (
            ", ".join(f"{name} {change}" for name, change in found) for found in (self._losses(), self._rewards())
        )
        parts = [
            f"round {self._done}/{self._total}",
            self._pace(),
            f"loss {losses}" if losses else "",
            f"reward {rewards}" if rewards else "",
        ]
        parts += [self._shares(), self._busiest(), f"weights {self._weights()}"]
        return " | ".join(filter(None, parts))

    def _render(self) -> RenderableType:
        """What the redrawing thread asks for; it cannot stop itself, so an error becomes a line."""
        try:
            return self._panel()
        except DISPLAY_ERRORS:
            return Text(f"{self._title} {self._done}/{self._total}")

    def _panel(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(self._title, style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._done, width=30),
            Text(f"{self._done}/{self._total}", style="bold"),
            Text(self._pace(), style="dim"),
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True)
        body.add_column()
        if self._last is not None:
            for what, found in (("loss", self._losses()), ("reward", self._rewards())):
                told = Text()
                for name, change in found:
                    told.append(f"{name} ", style="cyan").append(f"{change}   ")
                if found:
                    body.add_row(what, told)
            body.add_row("time", Text(self._shares()))
            if roles := self._roles():
                body.add_row("roles", Text(" | ".join(said for _, said in roles)))
            body.add_row("weights", Text(self._weights()))
        rows: list[RenderableType] = [head, body]
        if self._phase:
            since = duration(self._clock() - self._phase_since)
            self._spinner.update(text=Text.assemble(self._phase, (f"  {since}", "dim")))
            rows.append(self._spinner)
        return Group(*rows)
