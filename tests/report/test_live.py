"""The live view: plain lines without a terminal, a panel with one, and never an error."""

import io

import pytest
from rich.console import Console

from opd_ray.report.live import Live
from tests.report.run_folders import metrics_row

USES = {
    "learner": {"workers": 1, "busy": 0.58, "transfer": 0.01, "input": 0.41, "output": 0.0},
    "teacher.text": {"workers": 1, "busy": 0.97, "transfer": 0.02, "input": 0.01, "output": 0.0},
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def screen() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm"})


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_plain_lines_come_at_a_pace_and_always_first_and_last(clock):
    console = plain()
    with Live(10, "demo", console=console, clock=clock) as live:
        for index in range(10):
            clock.now += 2
            live.round(metrics_row(index))
    assert lines(console)[0] == "demo: rounds 1 to 10"
    rounds = [line.split(" | ")[0] for line in lines(console)[1:]]
    assert rounds == ["round 1/10", "round 4/10", "round 7/10", "round 10/10"]
    assert "loss compose 0.062 → " in lines(console)[-1]
    assert "weights 0.0.10, staleness 0" in lines(console)[-1]


def test_rewards_are_told_beside_losses_from_first_to_last(clock):
    console = plain()
    with Live(2, "pso", console=console, clock=clock) as live:
        for index, score in enumerate((0.4, 0.512)):
            clock.now += 6
            live.round(metrics_row(index, ("compose",)) | {"scores": {"compose": score}})
    assert " | reward compose 0.400 → 0.512 | " in lines(console)[-1]
    console = screen()
    with Live(1, "pso", console=console, clock=clock) as live:
        live.round(metrics_row(0) | {"scores": {"compose": 0.4}})
    assert "reward" in console.file.getvalue()
    plainly = plain()
    with Live(1, "demo", console=plainly, clock=clock) as live:
        live.round(metrics_row(0))
    assert "reward" not in plainly.file.getvalue(), "distillation scores nothing that it learns from"


def test_the_last_round_of_a_stopped_run_is_printed(clock):
    console = plain()
    with Live(10, "demo", console=console, clock=clock) as live:
        for index in range(3):
            clock.now += 1
            live.round(metrics_row(index))
    assert [line.split(" | ")[0] for line in lines(console)[1:]] == ["round 1/10", "round 3/10"]


def test_time_left_is_the_pace_times_the_rounds_left_less_what_has_passed(clock):
    live = Live(10, "demo", console=plain(), clock=clock)
    assert live.seconds_left is None
    live.round({"round": 0, "seconds": {"round": 5.0}})
    assert live.seconds_per_round == 5.0  # nothing but the row's own word yet
    assert live.seconds_left == 9 * 5.0
    clock.now += 3
    live.round({"round": 1, "seconds": {"round": 2.0}})
    clock.now += 4
    live.round({"round": 2, "seconds": {"round": 2.0}})
    assert live.seconds_per_round == (3 + 4) / 2
    assert live.seconds_left == 7 * 3.5
    clock.now += 2
    assert live.seconds_left == 7 * 3.5 - 2
    clock.now += 60  # a round that hangs takes away no more than its own share
    assert live.seconds_left == 6 * 3.5


def test_a_resumed_run_counts_from_where_it_begins(clock):
    console = plain()
    with Live(80, "demo", start_round=40, console=console, clock=clock) as live:
        live.round({"round": 40, "seconds": {"round": 2.0}})
        assert live.seconds_left == 39 * 2.0
    assert lines(console)[0] == "demo: rounds 41 to 80"
    assert lines(console)[1].startswith("round 41/80 | 2.0 s/round, 1 min 18 s left")


def test_a_console_that_knows_ascii_alone_gets_ascii(clock):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    with Live(2, "demo", console=Console(file=file), clock=clock) as live:
        live.round(metrics_row(0))
    assert b"compose 0.062 -> 0.062" in raw.getvalue()


def test_brackets_are_text(clock):
    console = plain()
    with Live(1, "demo [red]", console=console, clock=clock) as live:
        live.phase("starting [/] 3 workers")
        live.note("wrote runs/[bold]demo")
    assert lines(console)[1:] == ["starting [/] 3 workers", "wrote runs/[bold]demo"]
    assert "demo [red]" in lines(console)[0]


def test_the_panel_shows_phase_pace_loss_and_shares(clock):
    console = screen()
    with Live(80, "demo [x]", console=console, clock=clock) as live:
        live.phase("starting 3 workers [a]")
        clock.now += 8
        console.print(live._panel())
        live.round(metrics_row(0))
        console.print(live._panel())
        live.note("kept [this]")
    text = console.file.getvalue()
    for part in ("starting 3 workers [a]", "8.0 s", "demo [x]", "1/80", "% waiting", "kept [this]"):
        assert part in text


def test_who_waits_is_said_shortly(clock):
    console = screen()
    with Live(80, "demo", console=console, clock=clock) as live:
        live.round({"round": 0, "roles": USES})
        console.print(live._panel())
    assert "learner 58 % busy, 41 % waiting for input | text 97 % busy" in console.file.getvalue()
    console = plain()
    with Live(80, "demo", console=console, clock=clock) as live:
        live.round({"round": 0, "roles": USES})
    assert lines(console)[-1].split(" | ")[-2] == "text 97 % busy"


@pytest.mark.parametrize(
    "roles", [None, 3, {}, {"learner": None}, {"learner": {"busy": "x"}}, {"learner": {"busy": 0}}]
)
def test_rows_without_a_roles_time_are_shown_without_it(clock, capsys, roles):
    for console in (plain(), screen()):
        with Live(80, "demo", console=console, clock=clock) as live:
            live.round({"round": 0, "roles": roles})
            console.print(live._panel())
        assert "busy" not in console.file.getvalue() and "1/80" in console.file.getvalue()
    assert capsys.readouterr().err == ""


def test_no_error_reaches_the_loop(clock, capsys):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Live(10, "demo", console=Console(file=Closed()), clock=clock) as live:
        live.round(metrics_row(0))
        live.note("still here")
    with Live(10, "demo", console=plain(), clock=clock) as live:
        live.round({"no": "round"})
        live.round(metrics_row(0))
    assert capsys.readouterr().err.count("the run goes on") == 2


@pytest.mark.parametrize("console", [plain, screen])
def test_an_interrupt_passes_and_the_terminal_is_restored(clock, console):
    console = console()
    with pytest.raises(KeyboardInterrupt), Live(10, "demo", console=console, clock=clock) as live:
        live.round(metrics_row(0))
        raise KeyboardInterrupt
    text = console.file.getvalue()
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l")


def test_a_long_round_says_how_far_it_is(clock):
    console = plain()
    with Live(10, "demo", console=console, clock=clock) as live:
        for second in range(150):
            clock.now += 1
            live.within(second // 3, 54)
    assert lines(console)[1:] == ["round 1: 19 of 54 pieces of work", "round 1: 39 of 54 pieces of work"]
    console = screen()
    with Live(10, "demo", console=console, clock=clock) as live:
        live.within(3, 54)
        console.print(live._panel())
    assert "round 1: 3 of 54 pieces of work" in console.file.getvalue()
