"""A recorded `opd-ray scale`: one role from 1 worker to 3 and back while it works, with its rate before and after.

    python benchmarks/scale.py

Real Ray, the real pool, and the real command in another process, through a run folder. The workers are teachers of
fixed time: each answer takes 0.1 s of sleep, so that two cores can hold three of them. Nothing is lost on the way:
every request is answered once.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_ray.console import console
from opd_ray.runtime.cluster import RayBackend
from opd_ray.runtime.dispatch import Dispatcher
from opd_ray.runtime.handle import Done, WorkerSpec
from opd_ray.runtime.jobs import Job
from opd_ray.runtime.pool import Pool
from opd_ray.runtime.scaling import Scaler
from opd_ray.runtime.usage import Meter
from opd_ray.storage.control import serve
from opd_ray.storage.run_folder import claim, write_json_atomic

ANSWER_S = 0.1
ROLE = "teacher.text"


class Teacher:
    """Marks in a fixed time."""

    def ready(self) -> Done:
        """It is up."""
        return Done(None, 0.0, 0)

    def score(self, number: int) -> Done:
        """One answer."""
        time.sleep(ANSWER_S)
        return Done(number, ANSWER_S, 0)


class Driver:
    """What a run's driver does once a second, around one pool."""

    def __init__(self, folder: Path, backend: RayBackend) -> None:
        self.folder, self.attempt = folder, claim(folder, {"benchmark": "scale"})
        self.dispatcher = Dispatcher(backend, call_timeout_s=60)
        spec = WorkerSpec(ROLE, Teacher, threads=1, resources={"cpu": 0.1}, logs=folder / "logs")
        self.pool = Pool(backend, spec, 1, clock=time.monotonic, start_timeout_s=120, call_timeout_s=60)
        self.dispatcher.pools.append(self.pool)
        self.scaler, self.meter = Scaler({ROLE: self.pool}), Meter({ROLE: self.pool})
        self.dispatcher.tick = self.tick
        self.dispatcher.wait_ready()
        self.asked = self.answered = 0
        self.jobs: list[Job] = []
        self.tick()

    def tick(self) -> None:
        """Control and heartbeat."""
        serve(self.folder, self.scaler.request)
        beat: Mapping[str, Any] = {"status": "running", "round": 0, "rounds": 1, "attempt": self.attempt}
        write_json_atomic(self.folder / "status.json", {**beat, "time": time.time(), "roles": self.meter.roles()})

    def work(self, seconds: float) -> float:
        """Keep the queue filled for a while; returns answers a second."""
        start, before = time.monotonic(), self.pool.account.answers
        while time.monotonic() < start + seconds:
            while len(self.jobs) < 16:
                self.asked += 1
                self.jobs.append(self.dispatcher.submit(Job(self.pool, "score", (self.asked,), 0, "a mark")))
            self.dispatcher.wait([self.jobs[0]])
            self.answered += sum(job.done for job in self.jobs)
            self.jobs = [job for job in self.jobs if not job.done]
        return (self.pool.account.answers - before) / (time.monotonic() - start)

    def until(self, workers: int) -> float:
        """Work until so many are up and no others; returns seconds."""
        start = time.monotonic()
        while (status := self.pool.describe()).healthy != workers or status.draining or status.starting:
            self.work(0.5)
        return time.monotonic() - start


def main() -> None:
    """Scale up and down, and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    args = parser.parse_args()
    backend = RayBackend(object_store_mb=80)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            driver = Driver(Path(scratch) / "run", backend)
            rates = {"1 worker": driver.work(args.seconds)}
            for wanted, name in ((3, "3 workers"), (1, "1 worker again")):
                command = [Path(sys.executable).with_name("opd-ray"), "scale", driver.folder, f"{ROLE}={wanted}"]
                asking = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                seconds = driver.until(wanted)
                said, _ = asking.communicate(timeout=60)
                console.print(f"opd-ray scale RUN {ROLE}={wanted}: {said.strip()}", soft_wrap=True)
                console.print(f"{wanted} up and working {seconds:.1f} s after the command was typed")
                rates[name] = driver.work(args.seconds)
            driver.dispatcher.wait(driver.jobs)
            first = rates["1 worker"]
            for name, rate in rates.items():
                console.print(f"{name}: {rate:.1f} answers a second, {rate / first:.2f} x")
            lost, asked, answers = len(driver.pool.lost), driver.asked, driver.pool.account.answers
            console.print(f"{asked} requests, {answers} answers, {lost} workers lost")
    finally:
        backend.close()


if __name__ == "__main__":
    main()
