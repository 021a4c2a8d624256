"""GenEval's rewards on small random models of the true classes and files, and both models at their true widths."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from opd_ray.errors import ModelError, PromptError
from opd_ray.rewards import geneval, geneval_detector, make_rewards
from opd_ray.rewards.geneval_colours import Colours, crop
from opd_ray.rewards.geneval_detector import Detector, found_in
from opd_ray.rewards.geneval_rules import COLOURS, Found
from opd_ray.rewards.mask2former import Mask2Former
from opd_ray.rewards.raster import as_pixels
from tests.rewards.tiny_geneval import LABELS, TINY_CLIP, detector_config, make_clip, make_detector


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    return {
        "detector": str(make_detector(folder / "detector")),
        "clip": str(make_clip(folder / "clip")),
        "clip_architecture": TINY_CLIP,
    }


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def detections(places, images):
    return Detector(places["detector"], None, "cpu")(as_pixels(images))


def test_a_batch_is_seen_as_its_pictures_are_and_by_genevals_names(places, images, detections, monkeypatch) -> None:
    detector = Detector(places["detector"], None, "cpu")
    monkeypatch.setattr(geneval_detector, "AT_ONCE", 2)
    assert [seen.keys() for seen in detector(as_pixels(images))] == [seen.keys() for seen in detections]
    assert len(detector.names) == 80
    assert {"motorcycle", "airplane", "couch", "potted plant", "dining table", "tv"} <= set(detector.names)
    assert {"computer mouse", "tv remote", "computer keyboard"} <= set(detector.names)
    assert not {"mouse", "remote", "keyboard", "sofa"} & set(detector.names)
    assert all(detections)
    for image, together in zip(images, detections, strict=True):
        (alone,) = detector(as_pixels(image[None]))
        assert alone.keys() == together.keys()
        for name in alone:
            pairs = list(zip(alone[name], together[name], strict=True))
            assert [a.confidence for a, _ in pairs] == pytest.approx([b.confidence for _, b in pairs], abs=1e-4)
            assert all(one.mask.shape == (64, 48) for one in alone[name])


def test_the_model_sees_what_transformers_own_forward_would(places, images) -> None:
    """From the parts: the last decoder layer's queries through the class head, the last masks."""
    detector = Detector(places["detector"], None, "cpu")
    size = {"shortest_edge": 800, "longest_edge": 1333}
    given = detector._processor(images=list(as_pixels(images[:1])), size=size, return_tensors="pt")
    assert given["pixel_values"].shape == (1, 3, 1088, 800)  # 64 x 48 to 1066 x 800, up to a multiple of 32
    with torch.no_grad():
        parts = detector._model.model(**given, output_hidden_states=True)
        logits, masks = detector._model(**given)
    head = detector._model.class_predictor
    queries = parts.transformer_decoder_intermediate_states[-1][:, 0]
    assert torch.allclose(logits[0], queries @ head.weight.T + head.bias, atol=1e-4)
    assert torch.equal(masks, parts.masks_queries_logits[-1])


def test_the_norm_that_no_file_has_is_never_used(places, images, detections) -> None:
    detector = Detector(places["detector"], None, "cpu")
    with torch.no_grad():
        detector._model.model.pixel_level_module.encoder.swin.layernorm.weight.fill_(math.nan)
    assert [seen.keys() for seen in detector(as_pixels(images))] == [seen.keys() for seen in detections]


def test_objects_from_queries_by_hand() -> None:
    # Two classes and "nothing"; three queries.
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0], [0.5, 0.5, -9.0]])
    masks = torch.full((3, 4, 4), -2.0)
    masks[0, 1:3, 2:] = 1.0
    masks[2, 0, 0] = 4.0
    seen = found_in(logits, masks, ["cat", "dog"], (4, 4))
    sure, half = math.exp(3) / (math.exp(3) + 2), 0.5 / (1 + 0.5 * math.exp(-9.5))
    assert [(one.box, round(one.confidence, 5)) for one in seen["cat"]] == [
        ((2, 1, 4, 3), round(sure / (1 + math.exp(-1)), 5)),
        ((0, 0, 1, 1), round(half / (1 + math.exp(-4)), 5)),
    ]
    assert [one.box for one in seen["dog"]] == [(0, 0, 1, 1)]  # a query may stand for two classes
    assert seen["cat"][0].mask.sum() == 4
    larger = found_in(logits[:1], masks[:1], ["cat", "dog"], (8, 8))["cat"][0]
    assert larger.mask.shape == (8, 8)
    assert larger.box == (4, 2, 8, 6)
    assert found_in(logits[1:2], masks[1:2], ["cat", "dog"], (4, 4)) == {}  # it says "nothing"
    assert found_in(logits[:1], masks[1:2], ["cat", "dog"], (4, 4)) == {}  # sure, of no pixel


def test_crops_are_grey_outside_of_the_mask() -> None:
    picture = np.full((4, 6, 3), 200, dtype=np.uint8)
    mask = np.zeros((4, 6), dtype=bool)
    mask[1, 2] = True
    seen = np.asarray(crop(picture, Found((2, 1, 5, 3), 0.9, mask)))
    assert seen.shape == (2, 3, 3)
    assert seen[0, 0].tolist() == [200] * 3
    assert (seen[0, 1:] == 0x99).all()
    assert (seen[1] == 0x99).all()
    assert np.asarray(crop(picture, Found((2, 1, 5, 3), 0.9))).min() == 200


def test_colours_are_those_of_the_nearest_mean_sentence(places, images) -> None:
    """Sentence by sentence and crop by crop, against all at once."""
    classify = Colours(places["clip"], None, TINY_CLIP, "cpu")
    weights = Path(places["clip"]) / "open_clip_model.safetensors"
    model, _, transform = open_clip.create_model_and_transforms(TINY_CLIP, str(weights))
    assert model.visual.transformer.resblocks[0].mlp.gelu.__class__.__name__ == "QuickGELU"
    tokens = open_clip.get_tokenizer(TINY_CLIP)
    picture = as_pixels(images)[0]
    generator = np.random.default_rng(3)
    objects = []
    for _ in range(12):
        left, top, width, height = generator.integers(1, 24, 4)
        mask = np.zeros(picture.shape[:2], dtype=bool)
        mask[top : top + height, left : left + width] = generator.random((height, width)) < 0.7
        objects.append(Found((left, top, left + width, top + height), 0.9, mask))
    with torch.no_grad():
        means = []
        for colour in COLOURS:
            forms = (
                f"a photo of a {colour} bench",
                f"a photo of a {colour}-colored bench",
                f"a photo of a {colour} object",
            )
            units = [F.normalize(model.eval().encode_text(tokens([form]))[0], dim=0) for form in forms]
            means.append(F.normalize(sum(units) / 3, dim=0))
        expected = []
        for one in objects:
            pixels = picture.copy()
            pixels[~one.mask] = 0x99
            left, top, right, bottom = (int(side) for side in one.box)
            cut = transform(Image.fromarray(pixels[top:bottom, left:right]))
            look = F.normalize(model.encode_image(cut[None])[0], dim=0)
            expected.append(COLOURS[int(torch.stack([look @ mean for mean in means]).argmax())])
    assert classify(picture, "bench", objects) == expected
    assert classify(picture, "bench", []) == []


def test_the_three_scores_share_one_look(places, images, detections, monkeypatch) -> None:
    looked = []
    see = Detector.__call__
    monkeypatch.setattr(Detector, "__call__", lambda self, pixels: looked.append(len(pixels)) or see(self, pixels))
    geneval.observer.cache_clear()
    made = make_rewards(dict.fromkeys(("geneval", "geneval_strict", "geneval_partial"), places))
    assert len({id(reward._reward._observer) for reward in made.values()}) == 1
    first, second = detections[0], detections[2]
    name, other = max(first, key=lambda n: first[n][0].confidence), max(second, key=lambda n: second[n][0].confidence)
    there = sum(one.confidence > 0.3 for one in second[other])
    rows = [
        {"tag": "single_object", "include": [{"class": name, "count": 1}]},
        {"tag": None, "include": None},
        {"tag": "two_object", "include": json.dumps([{"class": other, "count": there + 2}]), "exclude": None},
    ]
    prompts = ["one", "a dream", "many"]
    scores = {key: reward(images.clone(), prompts, rows) for key, reward in made.items()}
    assert looked == [2]  # the picture without a row is not looked at, the others once
    for answer in scores.values():
        assert answer.shape == (3,)
        assert answer.isnan().tolist() == [False, True, False]
    assert scores["geneval"][[0, 2]].tolist() == [1.0, 0.0]
    assert scores["geneval_strict"][2] == 0.0
    assert scores["geneval_partial"][2].item() == pytest.approx(there / (there + 2))
    made["geneval"](images.flip(0), prompts, rows)
    assert looked == [2, 2]
    geneval.observer.cache_clear()


def test_a_detector_that_is_broken_sees_no_empty_picture() -> None:
    """NaN logits would read as nothing found, which is a score."""
    logits, masks = torch.zeros(2, 3), torch.zeros(2, 4, 4)
    for broken in ((logits * torch.nan, masks), (logits, masks / 0)):
        with pytest.raises(ArithmeticError, match="NaN or infinity"):
            found_in(*broken, ["cat", "dog"], (4, 4))


def test_an_unknown_class_is_refused_before_anything_runs(places, images) -> None:
    reward = geneval.GenEval(**places)
    with pytest.raises(
        PromptError, match=r"prompt 'a unicorn' ask for 'unicorn', which the detector does not know; it"
    ):
        reward(images[:1], ["a unicorn"], [{"include": [{"class": "unicorn", "count": 1}]}])
    assert reward(images[:1], ["x"], [{}]).isnan().all()


def test_files_that_do_not_fit_are_refused_in_one_line(places, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"GenEval's detector '/absent': there is no such file or folder"):
        Detector("/absent", None, "cpu")
    few = make_detector(tmp_path / "few", LABELS[:7])
    with pytest.raises(ModelError, match="knows 7 classes; GenEval needs one trained on COCO's 80"):
        Detector(str(few), None, "cpu")
    lacking = make_detector(tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["class_predictor.bias"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, class_predictor.bias first"):
        Detector(str(lacking), None, "cpu")
    (lacking / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"cannot be loaded: \w+: [^\n]+$"):
        Detector(str(lacking), None, "cpu")
    with pytest.raises(ModelError, match="open_clip has no architecture 'ViT-L-15'; GenEval's is ViT-L-14-quickgelu"):
        Colours(places["clip"], None, "ViT-L-15", "cpu")
    bare = make_clip(tmp_path / "bare")
    (bare / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"colour classifier '.*bare': there is no open_clip_model.safetensors"):
        Colours(str(bare), None, TINY_CLIP, "cpu")
    save_file({"logit_scale": torch.zeros(())}, bare / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=r"cannot be loaded as tiny-quickgelu: RuntimeError: [^\n]+$"):
        Colours(str(bare), None, TINY_CLIP, "cpu")


def test_the_detector_at_its_true_widths() -> None:
    """facebook/mask2former-swin-small-coco-instance: Swin-S, 100 queries, a file of 276 MB in float32."""
    with torch.device("meta"):
        model = Mask2Former(detector_config())
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = 2 * 768  # the norm that no file has
    parameters = sum(parameter.numel() for parameter in model.parameters()) - unused
    assert parameters == 68_739_547
    assert 274e6 < 4 * parameters < 277e6
    blocks = {
        name.split(".blocks.")[0][-1] + name.split(".blocks.")[1].split(".")[0] for name in sizes if ".blocks." in name
    }
    assert len(blocks) == 2 + 2 + 18 + 2
    assert sizes["class_predictor.weight"] == (81, 256)
    assert sizes["model.transformer_module.queries_features.weight"] == (100, 256)
    assert sizes["model.pixel_level_module.encoder.swin.embeddings.patch_embeddings.projection.weight"] == (96, 3, 4, 4)


def test_the_colour_classifier_at_its_true_widths() -> None:
    """OpenAI's ViT-L/14: 427,616,513 parameters, 446 tensors in open_clip's names."""
    model = open_clip.create_model(geneval.CLIP_ARCHITECTURE, device="meta")
    assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 427_616_513
    assert len(sizes) == 446
    assert sizes["visual.conv1.weight"] == (1024, 3, 14, 14)
    assert sizes["visual.transformer.resblocks.23.mlp.c_fc.weight"] == (4096, 1024)
    assert sizes["transformer.resblocks.11.attn.in_proj_weight"] == (2304, 768)
    assert sizes["visual.proj"] == (1024, 768)


def test_names_of_rewards_cost_no_import_of_a_model() -> None:
    code = (
        "import sys\nfrom opd_ray.rewards.base import REWARDS\nfrom opd_ray.plugins import load\n"
        "[load(n, REWARDS, 'reward') for n in REWARDS if n.startswith(('geneval', 'ocr', 'jpeg'))]\n"
        "sys.exit(' '.join({'transformers', 'open_clip', 'rapidocr', 'onnxruntime', 'cv2'} & set(sys.modules)) or 0)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
