"""Checkpoints that a copy or download left half done: one line that names the file, before weights are read."""

import json
import shutil

import pytest
from diffusers import SD3Transformer2DModel

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError
from opd_ray.evaluation.models import find_model
from opd_ray.models import load_family
from opd_ray.models.checkpoint import check_complete

SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny, tmp_path):
    """A checkpoint to break, whose transformer is in shards."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    shutil.rmtree(folder / "transformer")
    SD3Transformer2DModel.from_pretrained(tiny / "transformer").save_pretrained(
        folder / "transformer", max_shard_size="100KB"
    )
    return folder


def refused(folder, what, *parts, image=False) -> None:
    """As `sample` and a worker would be told, in one line each."""
    model = ModelConfig(path=str(folder))
    for call in (
        lambda: check_complete(model),
        lambda: find_model(str(folder)),
        lambda: load_family(model, text=True, image=True),
    ):
        with pytest.raises(ModelError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"model '{folder}': its {what} ") and "\n" not in message
        assert all(part in message for part in parts), message


def test_whole_ones_pass(copy, tiny):
    for folder in (copy, tiny, "world"):
        check_complete(ModelConfig(path=str(folder)))
    assert len(list((copy / "transformer").glob("*-of-*.safetensors"))) > 2
    load_family(ModelConfig(path=str(copy)), text=False, image=False)


def test_a_missing_shard(copy):
    shards = sorted((copy / "transformer").glob("*-of-*.safetensors"))
    shards[1].unlink()
    refused(copy, "transformer", f"{shards[1]} is missing, one of {len(shards)} shards: download the rest")


@pytest.mark.parametrize("content", ["half", "Git LFS", "empty"])
def test_a_file_that_is_cut_short(copy, content):
    file = copy / "vae" / SINGLE
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    file.write_bytes({"half": whole[: len(whole) // 2], "Git LFS": pointer, "empty": b""}[content])
    refused(copy, "vae", f"{file} is cut short, or a Git LFS pointer (", "download or copy it again")


def test_a_configuration_without_weights(copy):
    file = copy / "text_encoder_2" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    refused(
        copy,
        "text_encoder_2",
        f"{file.parent} has config.json but neither model.safetensors nor {SINGLE}",
        "pytorch_model.bin may hold code and is not loaded: save with safe_serialization=True",
    )


def test_weights_without_a_configuration(copy):
    (copy / "text_encoder" / "config.json").unlink()
    refused(copy, "text_encoder", f"{copy / 'text_encoder' / 'config.json'} is missing")


def test_an_index_that_is_no_index(copy):
    index = copy / "transformer" / f"{SINGLE}.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    refused(copy, "transformer", f"{index} ")
