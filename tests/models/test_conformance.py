"""check_family passes on ours, leaves it as it was, and sees each broken contract."""

import contextlib

import pytest
import torch

from opd_ray.config import ModelConfig
from opd_ray.models.sd3 import SD3
from opd_ray.testing import check_family


def load(tiny, kind=SD3):
    return kind.load(ModelConfig(path=str(tiny)), text=True, image=True)


def test_sd3_conforms_and_is_left_as_it_was(tiny):
    family = load(tiny)
    check_family(family)
    assert family.adapters == ()
    assert family.active is None
    assert not any(p.requires_grad for p in family.network.parameters())


class LongSigmas(SD3):
    def sigmas(self, num_steps):
        return super().sigmas(num_steps + 1)


class Restless(SD3):
    def encode(self, prompts):
        return {name: x + torch.randn(1) for name, x in super().encode(prompts).items()}


class Deaf(SD3):
    def encode(self, prompts):
        return super().encode(["same"] * len(prompts))


class Unguided(SD3):
    def velocity(self, x, t, cond, uncond, guidance):
        return super().velocity(x, t, cond, uncond, 1)


class Uncounted(SD3):
    def velocity(self, x, t, cond, uncond, guidance):
        answer = super().velocity(x, t, cond, uncond, guidance)
        self.forwards = 0
        return answer


class Signed(SD3):
    def decode(self, latents):
        return 2 * super().decode(latents) - 1


class Sampled(SD3):
    def encode_images(self, images):
        found = super().encode_images(images)
        return found + torch.randn_like(found)


class Blind(SD3):
    def encode_images(self, images):
        return super().encode_images(torch.zeros_like(images))


class Narrow(SD3):
    def random_conditioning(self, generator):
        known = super().random_conditioning(generator)
        return {**known, "pooled_projections": torch.randn(1, 3, generator=generator)}


class Thawed(SD3):
    @classmethod
    def load(cls, *args, **options):
        family = super().load(*args, **options)
        family.network.requires_grad_(True)
        return family


class AllTrained(SD3):
    def train_adapter(self, name):
        self.network.requires_grad_(True)


class Forgetful(SD3):
    @contextlib.contextmanager
    def adapter(self, name):
        self.use(name)
        yield


class Weak(SD3):
    def save_lora(self, name, folder, *, weights=None):
        half = {key: p.detach() / 2 for key, p in self.adapter_parameters(name).items()}
        super().save_lora(name, folder, weights=half)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LongSigmas, r"sigmas\(4\) is"),
        (Restless, "encode is deterministic"),
        (Deaf, "encode tells prompts apart"),
        (Unguided, "guidance 2 differs"),
        (Uncounted, "forwards count rows"),
        (Signed, r"images are in \[0, 1\]"),
        (Sampled, "encode_images is deterministic"),
        (Blind, "encode_images tells pictures apart"),
        (Narrow, r"it has encode's width"),
        (Thawed, "a loaded family is frozen"),
        (AllTrained, "only the adapter is trainable"),
        (Forgetful, "brings the adapter in use back"),
        (Weak, "survives save_lora and load_lora"),
    ],
)
def test_a_broken_contract_is_seen(tiny, kind, message):
    with pytest.raises(AssertionError, match=message):
        check_family(load(tiny, kind))
