import pytest
import torch

from opd_ray.config import LoraConfig, ModelConfig
from opd_ray.models import Family, load_family

PROMPTS = ["a red cat", "two blue dogs, reading"]


@pytest.fixture(scope="session")
def full(tiny) -> Family:
    """Every part loaded; tests leave no adapter on it."""
    return load_family(ModelConfig(path=str(tiny)), text=True, image=True)


@pytest.fixture
def family(tiny) -> Family:
    """A denoiser alone, fresh for each test."""
    return load_family(ModelConfig(path=str(tiny)), text=False, image=False)


@pytest.fixture(scope="session")
def batch(full):
    """Latents, and what the prompts say: (x, cond, uncond)."""
    x = torch.randn((2, *full.latent_shape), generator=torch.Generator().manual_seed(1))
    return x, full.encode(PROMPTS), full.encode([""])


@pytest.fixture
def answer(batch):
    """The conditional velocity of a family's adapter in use."""
    x, cond, _ = batch
    return lambda family: family.velocity(x, 0.7, cond, {}, 1).detach()


@pytest.fixture
def trained(tiny):
    """Another, with an adapter `student` of alpha 16 and rank 4 whose weights are not zero."""
    family = load_family(ModelConfig(path=str(tiny)), text=False, image=False)
    family.add_lora("student", LoraConfig(rank=4, alpha=16), seed=0)
    fill(family, "student")
    return family


@torch.no_grad()
def fill(family: Family, name: str) -> None:
    for index, parameter in enumerate(family.adapter_parameters(name).values()):
        noise = torch.Generator().manual_seed(index)
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise))
