"""The rewards' files on a hub: one on the loopback address, asked by huggingface_hub itself."""

import pytest
import torch
from huggingface_hub import constants

from opd_ray.errors import ModelError
from opd_ray.models.download import CHECKED_OUT
from opd_ray.rewards import make_rewards
from tests.models.fake_hub import fake_hub
from tests.rewards.tiny import pictures


@pytest.fixture
def hub(scorers, tmp_path, monkeypatch):
    """Has each published repository under its own name, with small weights in it."""
    with fake_hub() as hub:
        hub.repositories = {
            "yuvalkirstain/PickScore_v1": scorers["pickscore"].folder,
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": scorers["pickscore"].folder,
            "openai/clip-vit-large-patch14": scorers["aesthetic"].folder,
            "trl-lib/ddpo-aesthetic-predictor": scorers["aesthetic"].folder,
            "THUDM/ImageReward": scorers["imagereward"].folder,
            "google-bert/bert-base-uncased": scorers["imagereward"].folder,
            "xswu/HPSv2": tmp_path / "HPSv2",
        }
        (tmp_path / "HPSv2").mkdir()
        for name in ("hpsv2", "hpsv2_1"):
            file = scorers[name].folder / scorers[name].file
            (tmp_path / "HPSv2" / file.name).write_bytes(file.read_bytes())
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


def test_a_name_alone_loads_what_is_published(hub, scorers) -> None:
    small = {name: {"architecture": scorers[name].args["architecture"]} for name in ("hpsv2", "hpsv2_1")}
    rewards = make_rewards({name: small.get(name, {}) for name in scorers})
    for name, reward in rewards.items():
        assert torch.equal(reward(pictures(2), ["a", "b"]), scorers[name].made(pictures(2), ["a", "b"])), name
    sent = hub.downloads()
    assert sent["HPS_v2_compressed.pt"] == sent["HPS_v2.1_compressed.pt"] == sent["ImageReward.pt"] == 1
    assert sent["model.safetensors"] == 2  # PickScore's, and OpenAI's once for two rewards; none with a tokenizer


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("pickscore", {"model": "nobody/nothing"}, "has no such repository, or it is private"),
        ("pickscore", {"revision": "v9"}, "on the hub it has no revision 'v9'"),
        ("hpsv2", {"file": "HPS_v9.pt"}, "has no HPS_v9.pt"),
        ("imagereward", {"tokenizer": "xswu/HPSv2"}, "holds no tokenizer"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(hub, name, args, said) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        make_rewards({name: args})
    assert "\n" not in str(caught.value)
