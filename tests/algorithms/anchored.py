"""A second algorithm, with everything that on-policy distillation has not.

It reads recorded pictures' latents and regresses the velocity to them, anchored to the base and to an adapter that
follows the student:

    L = 1/2 |v - (eps - x0)|^2 + strength / 2 |v - v_reference|^2 + strength / (2 count) |v - v_old|^2

where count is its own state: how many work items it has seen.
"""

import torch

from opd_ray.algorithms import Algorithm, Forward, Loss
from opd_ray.diffusion import add_noise
from opd_ray.seeds import fold, noise


class Anchored(Algorithm):
    needs_rollouts = False
    adapters = ("old",)
    velocities = ("old", "reference")

    def __init__(self, strength, updates=3):
        self.strength, self.updates_per_round = strength, updates
        self.count = 0

    def observe(self, scores):
        self.count += len(scores)

    def select(self, items, update):
        return [items[update % len(items)]]

    def forwards(self, experience, update):
        x0 = experience.recorded["x0"]
        cond = {name.removeprefix("cond."): t for name, t in experience.recorded.items() if name.startswith("cond.")}
        for step in experience.item.steps:
            t = (step + 1) / 4
            seed = fold(0, "learner_noise", experience.item.round, experience.item.position, step)
            eps = noise([seed + row for row in range(len(x0))], x0.shape[1:])
            yield Forward(add_noise(x0, eps, t), t, 0.0, step, cond, {}, {"target": eps - x0})

    def loss(self, forward, velocity):
        student = velocity["student"]
        to = {name: (student - other).square().mean() for name, other in velocity.items() if name != "student"}
        fit = (student - forward.inputs["target"]).square().mean()
        total = 0.5 * fit + 0.5 * self.strength * (to["reference"] + to["old"] / self.count)
        return Loss(total, {"fit": fit.detach(), "drift": to["reference"].detach()})

    def follow(self, adapter, round):
        return 0.9

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = int(state["count"])


class Marked(Anchored):
    needs_teachers = True


class Scored(Anchored):
    needs_rewards = True


class Streaming(Anchored):
    streams = True


class Elsewhere(Anchored):
    behaviour = "reference"


class Jumping(Anchored):
    kernel = "jump"


def no_class(strength):
    return Anchored(strength)


def record(folder, family, tasks, files):
    """Recordings at random, ``files`` of each task."""
    from safetensors.torch import save_file

    for number, task in enumerate(tasks):
        (folder / task).mkdir(parents=True)
        for file in range(files):
            rng = torch.Generator().manual_seed(100 * number + file)
            cond = family.random_conditioning(rng)
            tensors = {f"cond.{name}": tensor.repeat(2, *(1,) * (tensor.ndim - 1)) for name, tensor in cond.items()}
            x0 = torch.randn((2, *family.latent_shape), generator=rng)
            save_file(tensors | {"x0": x0}, folder / task / f"{file}.safetensors")
