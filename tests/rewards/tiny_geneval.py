"""GenEval's two models in miniature: the true classes and file layouts, random weights that are sure of themselves."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerImageProcessor, SwinConfig

from opd_ray.rewards.mask2former import Mask2Former

# COCO's instance classes in the spelling of mmdet's first releases, which the published detector has.
LABELS = [
    *("person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "sofa"),
    *("pottedplant", "bed", "diningtable", "toilet", "tvmonitor", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors"),
    *("teddy bear", "hair drier", "toothbrush"),
]


def detector_config(labels: list[str] = LABELS, **changed: object) -> Mask2FormerConfig:
    """Mask2Former over a Swin of four stages; published widths unless they are changed."""
    swin = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    swin.update(changed.pop("swin", {}))
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=224, out_features=stages, **swin),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        num_labels=len(labels),
        **changed,
    )


def make_detector(folder: Path, labels: list[str] = LABELS) -> Path:
    """A folder as `save_pretrained` leaves it."""
    torch.manual_seed(0)
    config = detector_config(
        labels,
        swin={"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=12,
    )
    model = Mask2Former(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=8.0)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    # As older releases wrote it, the published file among them: with buffers, without a norm that nothing uses.
    weights = {name: tensor for name, tensor in weights.items() if ".swin.layernorm." not in name}
    weights["criterion.empty_weight"] = torch.ones(len(labels) + 1)
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    weights[f"{block}.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


TINY_CLIP = "tiny-quickgelu"
CLIP_CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def make_clip(folder: Path) -> Path:
    """A folder with the one file that is read of open_clip's hub repositories; its architecture is TINY_CLIP."""
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    (folder / f"{TINY_CLIP}.json").write_text(json.dumps(CLIP_CONFIG), encoding="utf-8")
    open_clip.add_model_config(folder / f"{TINY_CLIP}.json")
    weights = open_clip.create_model(TINY_CLIP).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    return folder
