"""Reads the text in pictures: RapidOCR's bundled models, offline, on as many threads as the role has."""

import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from opd_ray.errors import ConfigError
from opd_ray.rewards.raster import LastBatch, Pixels

__all__ = ["read", "reading_order", "require_reader"]

MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
LONGEST = 960
"""Larger pictures are scaled down for finding lines, in pixels; PaddleOCR 2.9.1 has the same limit."""


def require_reader() -> None:
    """Refuse a reward that reads where the reader is not installed.

    Raises:
        ConfigError: what to install.
    """
    for package in ("rapidocr", "onnxruntime"):
        if find_spec(package) is None:
            raise ConfigError(f"rewards ocr and ocr_exact need {package}: pip install 'opd-ray[ocr]' on every worker")


def read(pixels: Pixels) -> list[list[str]]:
    """The lines of text in each picture [B, H, W, 3], in reading order, none left out for a low confidence."""
    return _reader(torch.get_num_threads())(pixels)


def reading_order(boxes: npt.ArrayLike) -> list[int]:
    """The indices of boxes [N, 4, 2] (corners, x and y), by rows from the top and in each row from the left.

    A box belongs to a row if its middle lies within the height of the row's first box.
    """
    corners = np.asarray(boxes, dtype=float)
    left = corners[:, :, 0].min(1)
    top, bottom = corners[:, :, 1].min(1), corners[:, :, 1].max(1)
    middle = (top + bottom) / 2
    rows: list[list[int]] = []
    for i in np.argsort(middle, kind="stable").tolist():
        if rows and middle[i] <= bottom[rows[-1][0]]:
            rows[-1].append(i)
        else:
            rows.append([i])
    return [i for row in rows for i in sorted(row, key=lambda j: (left[j], middle[j]))]


@cache
def _reader(threads: int) -> LastBatch[list[list[str]]]:
    engine = _engine(threads)
    return LastBatch(lambda batch: [_lines(engine, picture) for picture in batch])


def _lines(engine: Any, picture: Pixels) -> list[str]:
    found = engine(np.ascontiguousarray(picture[:, :, ::-1]))  # it takes arrays as BGR, as OpenCV makes them
    if not found.txts:
        return []
    return [found.txts[i] for i in reading_order(found.boxes)]


def _engine(threads: int) -> Any:
    import omegaconf
    import rapidocr

    engine = rapidocr.RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.text_score": 0.0,
            "Global.use_cls": False,  # no lines upside down, as in the source
            "Det.limit_type": "max",
            "Det.limit_side_len": LONGEST,
        }
    )
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    folder = Path(rapidocr.__file__).parent / "models"
    # Its own sessions would spin between two calls, on cores that other roles use.
    with omegaconf.flag_override(engine.cfg, "allow_objects", True):
        for part, name in MODELS.items():
            engine.cfg[part].session = _session(folder / name, threads)
    return engine


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
