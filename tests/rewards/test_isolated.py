"""The example of original packages in environments of their own, with stand-ins for what they answer."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from examples import isolated
from opd_ray.recipes import load
from opd_ray.rewards.base import check_rewards
from tests.rewards.tiny_geneval import TINY_CLIP, make_clip

EXAMPLE = Path(__file__).parents[2] / "examples" / "isolated_reward.yaml"


def test_the_example_names_rewards_and_arguments_that_there_are() -> None:
    told = load(str(EXAMPLE))
    check_rewards(told.rewards, told.evaluation.rewards, list(told.prompts.eval))
    assert told.cluster.rewards.keys() == told.rewards.keys()
    assert all(told.cluster.of_reward(name).runtime_env["pip"] for name in told.rewards)


def test_paddles_answers_are_scored_by_the_same_formula(monkeypatch) -> None:
    class Engine:
        def __init__(self, **options) -> None:
            assert options["use_angle_cls"] is False

        def ocr(self, picture, cls):
            assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
            if picture.max() == 0:
                return [None]  # what 2.9.1 answers where it finds nothing
            return [[[[[0, 0]] * 4, ("Big ", 0.99)], [[[0, 0]] * 4, ("SALF", 0.4)], [[[0, 0]] * 4, ("x", 0.0)]]]

    package = ModuleType("paddleocr")
    package.PaddleOCR = Engine
    monkeypatch.setitem(sys.modules, "paddleocr", package)
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    scores = isolated.PaddleOcr()(images, ['a "big sale"', 'a "big sale"', "nothing"])
    assert scores[:2].tolist() == pytest.approx([6 / 7, 0.0])
    assert scores[2].isnan()


def test_mmdets_answers_go_through_the_same_rules(monkeypatch, tmp_path) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [4, 4, 8, 8], [0, 4, 4, 8]])
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    for i, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        masks[i, top:bottom, left:right] = True
    seen = SimpleNamespace(
        labels=torch.tensor([1, 0, 1]), bboxes=boxes, scores=torch.tensor([0.8, 0.95, 0.2]), masks=masks
    )
    seen.cpu = lambda: seen
    apis = ModuleType("mmdet.apis")
    apis.init_detector = lambda config, checkpoint, device: SimpleNamespace(
        dataset_meta={"classes": ("person", "mouse")}
    )
    apis.inference_detector = lambda model, pictures: [SimpleNamespace(pred_instances=seen) for _ in pictures]
    monkeypatch.setitem(sys.modules, "mmdet", ModuleType("mmdet"))
    monkeypatch.setitem(sys.modules, "mmdet.apis", apis)
    monkeypatch.setattr(isolated, "CLIP", str(make_clip(tmp_path / "clip")))
    monkeypatch.setattr(isolated, "CLIP_ARCHITECTURE", TINY_CLIP)
    reward = isolated.MmdetGenEval(config="c", checkpoint="p")
    mouse = {"class": "computer mouse", "count": 1, "position": ["left of", 0]}
    rows = [
        {"tag": "position", "include": [{"class": "person", "count": 1}, mouse]},
        {"tag": "counting", "include": [{"class": "computer mouse", "count": 1}]},
    ]
    assert reward(torch.rand(2, 3, 8, 8), ["", ""], rows).tolist() == [1.0, 0.0]  # 0.8 does not count as counted
