"""The original packages of two rewards, each in an environment of its own (isolated_reward.yaml).

PaddleOCR 2.9.1 and mmdet cannot be installed beside each other, nor beside this project's releases; a reward's
`runtime_env` gives its workers what it needs. Formulas and rules stay those of `ocr` and `geneval`.
"""

import numpy as np

from opd_ray.rewards.geneval import CLIP, CLIP_ARCHITECTURE, GenEval, Observer
from opd_ray.rewards.geneval_colours import Colours
from opd_ray.rewards.geneval_detector import SPELLINGS
from opd_ray.rewards.geneval_rules import Found
from opd_ray.rewards.ocr import Ocr


class PaddleOcr(Ocr):
    """`ocr` as Flow-GRPO reads: PaddleOCR 2.9.1 on the CPU, English, lines of any confidence above 0."""

    def __init__(self) -> None:
        from paddleocr import PaddleOCR

        self._engine = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)

    def read(self, pixels):
        """The lines of text in each picture [B, H, W, 3], in PaddleOCR's order."""
        return [self._lines(picture) for picture in pixels]

    def _lines(self, picture):
        (lines,) = self._engine.ocr(np.ascontiguousarray(picture), cls=False)
        return [text for _, (text, confidence) in lines or () if confidence > 0]


class MmdetGenEval(GenEval):
    """`geneval` with its own detector: mmdet's Mask2Former (Swin-S, COCO instances).

    Args:
        config: mmdet's configuration file, mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py.
        checkpoint: mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth of mmdet's model zoo.
        device: where both models run.
    """

    def __init__(self, *, config: str, checkpoint: str, device: str = "cpu") -> None:
        colours = Colours(CLIP, None, CLIP_ARCHITECTURE, device)
        self._observer = Observer(MmdetDetector(config, checkpoint, device), colours)


class MmdetDetector:
    """Finds COCO's 80 classes."""

    def __init__(self, config: str, checkpoint: str, device: str) -> None:
        from mmdet.apis import init_detector

        self._model = init_detector(config, checkpoint, device=device)
        self.names = [SPELLINGS.get(name, name) for name in self._model.dataset_meta["classes"]]

    def __call__(self, pixels):
        """Class -> objects, for each picture [B, H, W, 3]; GenEval's rules drop the unsure ones."""
        from mmdet.apis import inference_detector

        bgr = [np.ascontiguousarray(picture[:, :, ::-1]) for picture in pixels]
        return [self._objects(seen.pred_instances.cpu()) for seen in inference_detector(self._model, bgr)]

    def _objects(self, seen):
        found: dict[str, list[Found]] = {}
        columns = (seen.labels.tolist(), seen.bboxes.tolist(), seen.scores.tolist(), np.asarray(seen.masks, dtype=bool))
        for label, box, confidence, mask in zip(*columns, strict=True):
            found.setdefault(self.names[label], []).append(Found(tuple(box), confidence, mask))
        return found
