"""Models and LoRAs of a hub: a small one on the loopback address, asked by huggingface_hub itself."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from opd_ray.config import ModelConfig, TeacherConfig
from opd_ray.errors import ModelError
from opd_ray.evaluation.models import find_model
from opd_ray.models import load_family, read_shift
from opd_ray.models.download import CHECKED_OUT
from opd_ray.models.lora import read_lora
from tests.models.fake_hub import fake_hub

LICENCE = "accept the licence at https://huggingface.co/team/sd3 and set HF_TOKEN on the workers"


@pytest.fixture
def hub(tiny, tiny_teachers, tmp_path, monkeypatch):
    """Holds team/sd3 and team/loras. huggingface_hub reads its environment at import, so what it read is set."""
    loras = tmp_path / "loras"
    shutil.copytree(tiny_teachers["a"], loras / "OCRTeacher" / "lora")
    shutil.copytree(tiny_teachers["b"] / "peft", loras / "AesTeacher" / "lora")
    with fake_hub() as hub:
        hub.repositories = {"team/sd3": tiny, "team/loras": loras}
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        CHECKED_OUT.clear()
        yield hub
        CHECKED_OUT.clear()


def refused(call, *args, **options) -> str:
    with pytest.raises(ModelError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def model(name="team/sd3", **options) -> ModelConfig:
    return ModelConfig(path=name, **options)


def test_a_model_of_the_hub_is_the_model_of_its_folder(hub, tiny, full, batch):
    (tiny / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a second copy")
    try:
        family = load_family(model(), text=True, image=True)
    finally:
        (tiny / "transformer" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    x, cond, _ = batch
    assert torch.equal(family.velocity(x, 0.7, cond, {}, 1), full.velocity(x, 0.7, cond, {}, 1))
    assert all(
        torch.equal(tensor, cond[name])
        for name, tensor in family.encode(["a red cat", "two blue dogs, reading"]).items()
    )
    sent = hub.downloads()
    assert set(sent.values()) == {1} and not any("fp16" in file for file in sent)
    hub.requests.clear()
    CHECKED_OUT.clear()  # as another process
    load_family(model(), text=False, image=True)
    assert not hub.downloads()


def test_a_lora_in_a_subfolder_of_the_hub_binds_as_the_folders_own(hub, family, tiny_teachers):
    for name, home, subfolder in (("a", "OCRTeacher/lora", None), ("b", "AesTeacher/lora", "peft")):
        info = family.load_lora(name, "team/loras", subfolder=home)
        own = family.load_lora(f"own {name}", str(tiny_teachers[name]), subfolder=subfolder)
        assert (info.sha256, info.rank, info.alpha) == (own.sha256, 4, 8)
    assert not any(file.startswith("OCRTeacher/lora/peft") for file in hub.downloads())


def test_a_lora_of_another_name_is_found_where_it_is_the_only_one(hub, tmp_path):
    home = tmp_path / "loras" / "OCRTeacher" / "lora"
    (home / "pytorch_lora_weights.safetensors").rename(home / "mine.safetensors")
    assert read_lora("text", "team/loras", subfolder="OCRTeacher/lora").path.name == "mine.safetensors"
    shutil.copy(home / "mine.safetensors", home / "other.safetensors")
    message = refused(read_lora, "text", "team/loras", subfolder="OCRTeacher/lora")
    assert "has no pytorch_lora_weights.safetensors but mine.safetensors, other.safetensors" in message


def test_a_wrong_subfolder_lists_what_is_there(hub, tmp_path):
    for place in ("team/loras", str(tmp_path / "loras")):
        for wrong, here in ((None, "its top folder"), ("OCR", "subfolder 'OCR'")):
            assert refused(read_lora, "text", place, subfolder=wrong) == (
                f"LoRA 'text' ({place}): {here} has no *.safetensors; give one of these subfolders: "
                "AesTeacher/lora, OCRTeacher/lora, OCRTeacher/lora/peft"
            )
    shutil.copytree(hub.repositories["team/sd3"], tmp_path / "many" / "v1")
    hub.repositories["team/many"] = tmp_path / "many"
    for place in ("team/many", str(tmp_path / "many")):
        assert refused(read_shift, model(place, subfolder="v2")) == (
            f"model '{place}' has no readable scheduler/scheduler_config.json: subfolder 'v2' has no "
            "scheduler/scheduler_config.json; give one of these subfolders: v1"
        )
    assert refused(read_shift, model(subfolder="v2")).endswith("give one of these subfolders: none (the top folder)")
    assert refused(read_shift, model("team/loras")).endswith("; its folders are AesTeacher, OCRTeacher")


def test_a_gated_model_says_what_to_accept_and_to_set(hub, monkeypatch):
    hub.gated, hub.token = {"team/sd3"}, "secret"
    expected = f"model 'team/sd3' is no folder here, and on the hub it is gated: {LICENCE}"
    assert refused(find_model, "team/sd3") == expected
    assert refused(load_family, model(), text=False, image=False) == expected
    monkeypatch.setenv("HF_TOKEN", "another")
    assert refused(read_shift, model()) == expected
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert read_shift(model()) == 3.0
    hub.gated.add("team/loras")
    hub.token = None
    assert refused(read_lora, "text", "team/loras", subfolder="OCRTeacher/lora").startswith(
        "LoRA 'text': 'team/loras' is no folder here, and on the hub it is gated: accept the licence at"
    )


def test_a_missing_model_or_revision_is_told_apart(hub):
    assert refused(find_model, "team/sd4") == (
        f"model 'team/sd4' is no folder here, and {hub.url} has no such repository, or it is private: check the name, "
        f"or {LICENCE.replace('sd3', 'sd4')}"
    )
    expected = "on the hub it has no revision 'v9': give a branch, tag or commit of https://huggingface.co/team/"
    assert expected + "sd3" in refused(read_shift, model(revision="v9"))
    assert expected + "loras" in refused(read_lora, "text", "team/loras", revision="v9")
    assert read_shift(model(revision="main")) == 3.0


def test_offline_is_said_at_once_and_the_cache_serves(hub, monkeypatch):
    read_shift(model())
    hub.requests.clear()
    CHECKED_OUT.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    assert read_shift(model()) == 3.0
    for call, wanted in [
        (lambda: load_family(model(), text=False, image=False), "model_index.json"),
        (lambda: read_shift(model(subfolder="v2")), "v2/scheduler/scheduler_config.json"),
        (lambda: read_shift(model("team/new")), "scheduler/scheduler_config.json"),
        (lambda: read_lora("text", "team/loras"), "pytorch_lora_weights.safetensors"),
    ]:
        message = refused(call)
        assert f"HF_HUB_OFFLINE is set while {wanted} is not in the cache: unset it, or fill the cache" in message
    assert time.perf_counter() - start < 1
    assert not hub.requests


@pytest.mark.parametrize("status", [None, 503, 403])
def test_no_network_is_one_line_and_the_cache_serves(hub, monkeypatch, status):
    read_shift(model())
    CHECKED_OUT.clear()
    hub.status = status
    if status is None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    assert read_shift(model()) == 3.0
    assert refused(read_shift, model(subfolder="v2")).endswith("give one of these subfolders: none (the top folder)")
    message = refused(read_shift, model("team/new"))
    if status == 403:
        assert "the hub refuses this token (403): accept the licence at https://huggingface.co/team/new" in message
    else:
        cause = "HfHubHTTPError: Server error '503" if status else "ConnectError: "
        assert f"does not give scheduler/scheduler_config.json ({cause}" in message
        assert message.endswith("not in the cache either: check the network and HF_ENDPOINT, or give a folder")
    assert time.perf_counter() - start < 2


SCRIPT = """
import os
from diffusers import AutoencoderKL, SD3Transformer2DModel  # once, before there are three of us
from opd_ray.config import ModelConfig
from opd_ray.models import load_family

for rank in range(3):
    if os.fork() == 0:
        family = load_family(ModelConfig(path="team/sd3"), text=False, image=True)
        print(sum(p.numel() for p in family.network.parameters()), flush=True)
        os._exit(0)
assert [os.wait()[1] for rank in range(3)] == [0, 0, 0]
"""


def test_processes_of_one_node_download_each_file_once(hub, full, tmp_path):
    hub.delay_s = 0.5  # long enough for all of them to ask for what the first is getting
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environ = {name: x for name, x in environ.items() if name not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, timeout=120)
    expected = str(sum(p.numel() for p in full.network.parameters()))
    assert done.stdout.split() == [expected] * 3, done.stderr
    asked = [path for kind, path in hub.requests if kind == "HEAD" and path.endswith("transformer/config.json")]
    assert len(asked) > 1  # they were there at once
    sent = hub.downloads()
    assert "transformer/diffusion_pytorch_model.safetensors" in sent
    assert set(sent.values()) == {1}, sent


def test_half_of_a_hubs_checkpoint_is_named(hub, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "half")
    (tmp_path / "half" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    hub.repositories["team/half"] = tmp_path / "half"
    message = refused(load_family, model("team/half"), text=False, image=True)
    assert "vae has config.json but neither model.safetensors nor diffusion_pytorch_model.safetensors" in message


def test_teachers_of_the_hub_are_checked_before_anything_is_loaded(hub):
    from opd_ray.config import LoraConfig
    from opd_ray.models import check_adapters

    teacher = TeacherConfig(lora="team/loras", subfolder="OCRTeacher/lora")
    check_adapters(model(), LoraConfig(rank=4), {"text": teacher})
    assert not any(file.endswith("model.safetensors") for file in hub.downloads())
