import pytest
import torch

from opd_ray.world import pipeline_path


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(str(pipeline_path() / "vae")).float().eval()
