"""The processes of a job's stages: each hears once what was asked of the job. No Ray, and a child that only listens."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from opd_ray.commands import stages as module
from opd_ray.commands.stages import Drivers
from opd_ray.commands.train import JOB, ONE_REQUEST_S, signals
from opd_ray.errors import Stopped
from opd_ray.recipes import load
from opd_ray.stages import stages

LISTEN = """
import pathlib, signal, sys, time
recipe = pathlib.Path(sys.argv[2])
def hear(number, frame):
    with recipe.with_suffix(".heard").open("a") as file:
        print(signal.Signals(number).name, file=file)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, hear)
recipe.with_suffix(".ready").touch()
end = time.monotonic() + 20
while not recipe.with_name("enough").exists():
    time.sleep(0.02)
    if time.monotonic() > end:
        sys.exit("nobody ended it")
sys.exit(3)
"""


class Nowhere:
    """A cluster on which nothing runs; while its drivers are waited for, something is done once."""

    address = "127.0.0.1:1"

    def __init__(self, act):
        self.act = act

    def wait(self, refs, timeout_s):
        act, self.act = self.act, lambda: None
        act()
        time.sleep(0.02)


class Listeners:
    """Two drivers that listen until it is enough, and what they heard."""

    def __init__(self, folder, act):
        first, _ = stages(load("world_two_stages"), folder)
        self.stages, self.folder, self.act = first[:2], folder, act
        self.drivers = Drivers(Nowhere(self._act), [])

    def run(self):
        with signals(self.drivers.heard), pytest.raises(Stopped, match="--resume goes on from there"):
            self.drivers.run(self.stages)

    def ready(self, recipe):
        until = time.monotonic() + 20
        while not recipe.with_suffix(".ready").exists():
            assert time.monotonic() < until
            time.sleep(0.02)

    def heard(self):
        """By stage that was started."""
        told = {path.stem: path.with_suffix(".heard") for path in self.folder.glob("*.ready")}
        return {name: path.read_text().split() if path.exists() else [] for name, path in told.items()}

    def _act(self):
        for path in self.folder.glob("*.yaml"):
            self.ready(path)
        self.act(self.drivers)
        (self.folder / "enough").touch()


@pytest.fixture
def listeners(monkeypatch, tmp_path):
    """Make them, for something that is done once they listen."""
    monkeypatch.setattr(module, "COMMAND", LISTEN)
    return lambda act=lambda drivers: None: Listeners(tmp_path, act)


@pytest.mark.parametrize(
    ("number", "pause", "times"), [("SIGTERM", 0.1, 1), ("SIGTERM", ONE_REQUEST_S + 0.1, 2), ("SIGINT", 0.1, 2)]
)
def test_a_request_is_passed_on_once(listeners, number, pause, times):
    def ask(drivers):
        drivers.heard(signal.Signals[number], None)
        time.sleep(pause)
        drivers.heard(signal.Signals[number], None)

    two = listeners(ask)
    two.run()
    assert two.heard() == {"compose": [number] * times, "text": [number] * times}


def test_in_a_job_of_ray_it_is_not_passed_on_for_ray_does(listeners, monkeypatch):
    monkeypatch.setenv(JOB, "{}")
    two = listeners(lambda drivers: drivers.heard(signal.SIGTERM, None))
    two.run()
    assert two.heard() == {"compose": [], "text": []}


@pytest.mark.parametrize(
    ("at", "in_job", "heard"),
    [
        ("text", False, {"compose": ["SIGTERM"], "text": ["SIGTERM"]}),
        ("compose", False, {"compose": ["SIGTERM"]}),  # the other one is not started
        ("compose", True, {"compose": ["SIGTERM"]}),  # Ray looked for processes before there was this one
    ],
)
def test_a_signal_that_comes_while_a_driver_is_made_reaches_it(listeners, monkeypatch, at, in_job, heard):
    two, start = listeners(), subprocess.Popen

    def interrupted(command, **settings):
        process, recipe = start(command, **settings), Path(command[5])
        two.ready(recipe)
        if recipe.stem == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    if in_job:
        monkeypatch.setenv(JOB, "{}")
    two.run()
    assert two.heard() == heard
