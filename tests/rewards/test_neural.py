"""The neural rewards on small random models of the true classes: what all of them must do."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_ray.errors import ConfigError, ModelError, RewardError
from opd_ray.models.published import read_published
from opd_ray.rewards.base import check_rewards
from tests.rewards.conftest import NAMES
from tests.rewards.tiny import pictures

PROMPTS = ["a red cat", "two dogs, 3 birds and a blue house by the sea", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_scored_as_its_pictures_are_one_by_one(scorers, name) -> None:
    reward, images = scorers[name].made, pictures(3, 48, 40)
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.isfinite().all()
    alone = [reward(images[[i]], PROMPTS[i : i + 1]) for i in range(3)]
    assert torch.allclose(scores, torch.cat(alone), atol=1e-5)
    assert scores.unique().numel() == 3  # no constant, which would pass


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_counts_where_it_should(scorers, name) -> None:
    reward, image = scorers[name].made, pictures(1).expand(2, -1, -1, -1)
    one, other = reward(image, ["a red cat", "a blue dog"]).tolist()
    assert (one == other) == (name == "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_is_too_long_is_cut_off(scorers, name) -> None:
    words = "a long story of " * 125
    score = scorers[name].made(pictures(2), [words, words + "another end"])
    assert score.isfinite().all()


def test_imagereward_reads_35_tokens_and_no_more(scorers) -> None:
    reward = scorers["imagereward"].made
    first = "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6"  # 33 letters, [CLS] and [SEP]
    score = reward(pictures(1).expand(3, -1, -1, -1), [first, first + " 7", first[:-1] + "8"])
    assert score[0] == score[1] and score[0] != score[2]


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_a_clip_reads_77_tokens_and_no_more(scorers, name) -> None:
    reward = scorers[name].made
    first = "a " * 74
    score = reward(pictures(1).expand(3, -1, -1, -1), [first + "b", first + "b c", first + "d"])
    assert score[0] == score[1] and score[0] != score[2]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_that_are_none_are_not_scored(scorers, name) -> None:
    reward, broken = scorers[name].made, pictures(1)
    broken[0, 1, 2, 3] = torch.nan
    with pytest.raises(RewardError, match="NaN or infinity"):
        reward(broken, ["a"])
    with pytest.raises(RewardError, match=r"are \[1, 1, 32, 32\], expected \[B, 3, H, W\]"):
        reward(pictures(1)[:, :1], ["a"])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_learns_and_nothing_drops(scorers, name) -> None:
    reward = scorers[name].made
    network = getattr(reward, "network", None) or reward.clip.network
    parts = [network, *([reward.head] if name == "aesthetic" else [])]
    for module in (inner for part in parts for inner in part.modules()):
        assert not module.training
    assert not any(parameter.requires_grad for part in parts for parameter in part.parameters())
    images = pictures(2).requires_grad_()
    assert torch.equal(reward(images, ["a", "b"]), reward(images, ["a", "b"]))
    assert not reward(images, ["a", "b"]).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_probes_are_pairs_of_pictures_that_the_reward_can_score(scorers, name) -> None:
    reward = scorers[name].made
    for probe in reward.probes():
        for image, prompt in (probe.better, probe.worse):
            assert image.shape == (3, 224, 224) and image.min() >= 0 and image.max() <= 1 and prompt
            assert reward(image[None], [prompt]).isfinite().all()
        assert not torch.equal(probe.better[0], probe.worse[0])


def test_a_scorer_that_sees_colour_ranks_the_colours(scorers) -> None:
    def redness(image, prompt):
        return (image[0] - image[2]).mean() * (1 if "red" in prompt else -1)

    probes = scorers["pickscore"].made.probes()
    assert len(probes) == 2
    assert all(redness(*probe.better) > redness(*probe.worse) for probe in probes)
    assert not all(probe.better[0].mean() > probe.worse[0].mean() for probe in probes)  # a blind one does not


def test_pickscore_over_26_is_its_26th_part(scorers) -> None:
    scorer = scorers["pickscore"]
    raw, part = scorer.made(pictures(2), ["a", "b"]), scorer.make(divide_by=26)(pictures(2), ["a", "b"])
    assert torch.allclose(raw / 26, part, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_it_tells_which_weights_it_is(scorers, name) -> None:
    scorer = scorers[name]
    told = {key.rsplit("/", 1)[1]: sha for key, sha in scorer.made.weights.items()}
    out = subprocess.run(["sha256sum", scorer.folder / scorer.file], capture_output=True, text=True, check=True).stdout
    assert told[scorer.file] == out.split()[0]
    assert set(told) <= {scorer.file, "model.safetensors"}


def copied(scorer, tmp_path):
    """Its files in another folder, and the arguments for them."""
    folder = shutil.copytree(scorer.folder, tmp_path / "copy")
    args = {key: str(folder) if value == str(scorer.folder) else value for key, value in scorer.args.items()}
    return folder, args


def changed(path, change) -> None:
    """The weights of a file, with a change."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return
    content = torch.load(path, weights_only=True)
    change(content.get("state_dict", content))
    torch.save(content, path)


def refused(scorer, args) -> str:
    with pytest.raises(ModelError) as caught:
        scorer.make(**args)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800
    return text


LAST = {  # a tensor of each, in the file's own words and in those of the message
    "pickscore": ("text_projection.weight", "text_projection.weight"),
    "clipscore": ("visual_projection.weight", "visual_projection.weight"),
    "aesthetic": ("layers.6.weight", "layers.6.weight"),
    "hpsv2": ("visual.proj", "visual.proj"),
    "hpsv2_1": ("transformer.resblocks.1.mlp.c_fc.weight", "transformer.resblocks.1.mlp.c_fc.weight"),
    "imagereward": ("blip.visual_encoder.norm.bias", "viewer.post_layernorm.bias"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_is_named(scorers, name, tmp_path) -> None:
    folder, args = copied(scorers[name], tmp_path)
    theirs, ours = LAST[name]
    changed(folder / scorers[name].file, lambda tensors: tensors.pop(theirs))
    assert ours in refused(scorers[name], args)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_named(scorers, name, tmp_path) -> None:
    folder, args = copied(scorers[name], tmp_path)
    theirs, ours = LAST[name]
    changed(folder / scorers[name].file, lambda tensors: tensors.update({theirs: torch.zeros(3, 5)}))
    text = refused(scorers[name], args)
    assert ours in text and "3, 5" in text


@pytest.mark.parametrize("name", ["aesthetic", "hpsv2", "imagereward"])
def test_a_tensor_too_many_is_named(scorers, name, tmp_path) -> None:
    folder, args = copied(scorers[name], tmp_path)
    changed(folder / scorers[name].file, lambda tensors: tensors.update(rogue=torch.zeros(1)))
    assert "has 1 tensors that" in (text := refused(scorers[name], args)) and text.endswith("the first is rogue")


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_not_there_is_named(scorers, name, tmp_path) -> None:
    gone = str(tmp_path / "gone")
    for key in {"model", "processor", "head", "tokenizer"} & scorers[name].args.keys():
        text = refused(scorers[name], {key: gone})
        assert gone in text and "there is no such file or folder, and it is no hub id" in text
    (empty := tmp_path / "empty").mkdir()
    text = refused(scorers[name], {"head" if name == "aesthetic" else "model": str(empty)})
    assert str(empty) in text and ("has no" in text or "is missing" in text)


WITH_TOKENIZER = {"pickscore": "processor", "clipscore": "processor", "imagereward": "tokenizer"}


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_a_folder_without_a_tokenizer_is_refused(scorers, name, tmp_path) -> None:
    """transformers makes one that knows no word."""
    text = refused(scorers[name], {WITH_TOKENIZER[name]: str(tmp_path)})
    wanted = "none of tokenizer.json, or vocab.json with merges.txt, or vocab.txt"
    assert text.endswith(f"{WITH_TOKENIZER[name]} '{tmp_path}' holds no tokenizer: {wanted}")


def test_a_tokenizer_of_another_model_is_refused(scorers, tmp_path) -> None:
    bert = str(scorers["imagereward"].folder)
    assert "one is not made for the other" in refused(scorers["pickscore"], {"processor": bert})
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na")
    text = refused(scorers["imagereward"], {"tokenizer": str(tmp_path)})
    assert "knows 6 tokens" in text and text.endswith("81, which may be [DEC], [ENC] more and nothing else")


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2_1", "aesthetic", "imagereward"])
def test_a_file_may_be_given_itself_and_as_safetensors(scorers, name, tmp_path) -> None:
    scorer = scorers[name]
    path = scorer.folder / scorer.file
    content = torch.load(path, weights_only=True)
    save_file(content.get("state_dict", content), tmp_path / "weights.safetensors")
    key = "head" if name == "aesthetic" else "model"
    for place in (path, tmp_path / "weights.safetensors"):
        assert torch.equal(scorer.make(**{key: str(place)})(pictures(1), ["a"]), scorer.made(pictures(1), ["a"]))


class Rogue:
    """What a file may do to whoever unpickles it."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_that_would_execute_something_is_refused(tmp_path) -> None:
    torch.save({"state_dict": Rogue(tmp_path / "executed")}, tmp_path / "rogue.pt")
    with pytest.raises(ModelError, match=r"is no file of plain tensors .*nothing else is loaded"):
        read_published("HPSv2: model", str(tmp_path / "rogue.pt"), "")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_holds_something_else_is_refused(tmp_path, name, content) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_published("HPSv2: model", str(tmp_path), name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_short_and_one_without_tensors_are_refused(tmp_path) -> None:
    torch.save({"epoch": 3}, tmp_path / "no.pt")
    with pytest.raises(ModelError, match="holds no tensors by name, neither at its top nor under 'state_dict'"):
        read_published("x", str(tmp_path), "no.pt")
    torch.save({"a": torch.zeros(5000)}, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:9000])
    with pytest.raises(ModelError, match=r"half\.pt"):
        read_published("x", str(tmp_path), "half.pt")


def test_an_architecture_that_open_clip_does_not_have_is_named(scorers) -> None:
    with pytest.raises(
        ModelError, match=r"open_clip has no architecture 'ViT-H-15'; the published weights are ViT-H-14"
    ):
        scorers["hpsv2"].make(architecture="ViT-H-15")


def test_their_arguments_are_checked_before_anything_is_loaded() -> None:
    check_rewards({name: {} for name in NAMES}, {}, ())
    with pytest.raises(ConfigError, match="PickScore takes no argument 'mdoel'; it takes model, processor"):
        check_rewards({"pickscore": {"mdoel": "x"}}, {}, ())


def test_a_name_costs_neither_transformers_nor_open_clip() -> None:
    script = (
        "import sys; from opd_ray.rewards.base import check_rewards;"
        f"check_rewards({{name: {{}} for name in {NAMES}}}, {{}}, ());"
        "print(sorted({'transformers', 'open_clip', 'diffusers', 'torchvision'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_card_scores_as_the_processor_does(scorers, name) -> None:
    images = pictures(3, 48, 40)
    card = scorers[name].make(device="cuda")(images.cuda(), PROMPTS)
    assert card.device.type == "cpu"
    assert torch.allclose(card, scorers[name].made(images, PROMPTS), atol=2e-3)
