"""Hosts of small Ray workers: they import no model."""

import os
import signal
import time

import numpy as np
import torch

from opd_ray.runtime.handle import Done


class Toy:
    """Answers, fails, hangs and dies on request."""

    def ready(self):
        return Done(os.getpid(), 0.0, 0)

    def make(self, count):
        return np.arange(count, dtype=np.uint8), Done(count, 0.0, 0)

    def total(self, flat):
        return Done(int(flat.sum()), 0.0, 0)

    def environment(self, name):
        return Done(os.environ.get(name), 0.0, 0)

    def threads(self):
        return Done(torch.get_num_threads(), 0.0, 0)

    def fail(self):
        raise ZeroDivisionError("own")

    def nap(self, seconds):
        time.sleep(seconds)
        return Done("rested", 0.0, 0)

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def put(self):
        import ray

        return Done([ray.put(np.zeros(10))], 0.0, 0)
