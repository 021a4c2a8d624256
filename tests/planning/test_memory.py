"""Memory estimates from configs alone, and what does not fit."""

import json
import re
from pathlib import Path

import pytest

from opd_ray.config import ModelConfig
from opd_ray.errors import ModelError, PlacementError
from opd_ray.models.sd3 import SD3
from opd_ray.planning import check_memory as check
from opd_ray.planning import needs
from opd_ray.recipes import load
from tests.planning.sd35 import write_configs


def check_memory(config):
    check(config, needs(config))


CLUSTERS = Path(__file__).parents[2] / "configs" / "cluster"


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """Overrides that put the recipe on configs without weights."""
    return f"model.path={write_configs(tmp_path_factory.mktemp('sd35'))}"


def test_parameters_are_those_of_the_published_model(medium):
    shape = SD3.shape(ModelConfig(path=medium.partition("=")[2], resolution=512))
    assert shape.parameters["denoiser"] == pytest.approx(2.47e9, rel=0.01)
    assert shape.parameters["text"] == pytest.approx(4.762e9 + 0.695e9 + 0.124e9, rel=0.01)
    assert shape.parameters["vae"] == pytest.approx(83.8e6, rel=0.01)
    assert (shape.layers, shape.width, shape.pixels, shape.tokens) == (24, 1536, 512, 32 * 32 + 77 + 128)


@pytest.mark.parametrize("cluster", ["8gpu", "one_gpu"])
def test_the_cluster_files_say_what_plan_prints(medium, cluster):
    text = " ".join((CLUSTERS / f"{cluster}.yaml").read_text().split())
    said = dict(re.findall(r"[:,] ([a-z ]+?) (\d+\.\d) GB", text))
    found = {need.role: f"{need.total:.1f}" for need in needs(load("sd35_mopd", [medium, f"cluster={cluster}"]))}
    assert said == found


def test_by_hand(medium):
    """One learner in bf16; 8 targets in 24 layers, each 2 x 32 x 1536 numbers, six copies of 4 bytes."""
    learner = needs(load("sd35_mopd", [medium, "cluster=8gpu"]))[-1]
    assert learner.weights == pytest.approx(2.47 * 2, rel=0.01)
    assert learner.trained == pytest.approx(8 * 24 * 2 * 32 * 1536 * 4 * 6 / 1e9)
    token = 12 * 1229 * 1536 * 2 / 1e9  # guided rows of 6 pictures
    assert learner.working == pytest.approx(token * (24 + 17))
    kept = needs(load("sd35_mopd", [medium, "cluster=8gpu", "student.gradient_checkpointing=false"]))[-1]
    assert kept.working == pytest.approx(token * (24 * 17 + 17))


def test_what_does_not_fit_is_refused_by_name(medium):
    check_memory(load("sd35_mopd", [medium, "cluster=8gpu"]))
    small = [medium, "cluster=8gpu", "cluster.gpu_memory_gb=16", "cluster.rollout.resources={gpu: 0}"]
    with pytest.raises(PlacementError, match=r"role learner needs about 25.2 GB .* has 16.0 GB of a card of") as error:
        check_memory(load("sd35_mopd", [*small, "student.gradient_checkpointing=false"]))
    assert "lower batch.item_size, set student.gradient_checkpointing" in str(error.value)
    with pytest.raises(PlacementError, match="role all roles together needs about"):
        check_memory(load("sd35_mopd", [medium, "cluster=one_gpu", "cluster.gpu_memory_gb=16"]))
    with pytest.raises(PlacementError, match=r"role rollout .* has 8.0 GB of a card of 80 GB"):
        check_memory(load("sd35_mopd", [medium, "cluster=8gpu", "cluster.rollout.resources={gpu: 0.1}"]))


@pytest.mark.parametrize("resolution", [500, 520, 8192])
def test_a_resolution_that_does_not_divide_is_refused(medium, resolution):
    with pytest.raises(
        ModelError, match=rf"model.resolution {resolution} does not fit .*expected a multiple of 16 up to"
    ):
        SD3.skeleton(ModelConfig(path=medium.partition("=")[2], resolution=resolution))


def weights(medium, *overrides):
    return sum(need.workers * need.weights for need in needs(load("sd35_mopd", [medium, *overrides])))


def test_a_full_checkpoint_is_counted_once_wherever_it_lies(medium, tmp_path):
    """The base is 2.47 G numbers, the text encoders 5.58 G; two bytes each, and the VAE's 84 M four."""
    base, other = (2.47 + 5.58) * 2 + 0.084 * 4, (2.47 + 5.58) * 2
    teacher = ("cluster=one_gpu", f"teachers.ocr={{model: {write_configs(tmp_path)}, guidance: 4.5}}")
    assert weights(medium, "cluster=one_gpu") == pytest.approx(base, rel=0.01)
    assert weights(medium, *teacher) == pytest.approx(base + other, rel=0.01)
    assert weights(medium, *teacher, "cluster.share_teachers=false") == pytest.approx(base + other, rel=0.01)
    drawn = ("evaluation.images_per_task=4", "rewards={look: {}}", "evaluation.rewards={ocr: [look]}")
    assert weights(medium, *teacher, *drawn) == pytest.approx(2 * base + other, rel=0.01)
    file = tmp_path / "transformer" / "config.json"
    wider = json.loads(file.read_text()) | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
    file.write_text(json.dumps(wider))
    assert weights(medium, *teacher) > base + other + 10, "the teacher's own size counts"
    with pytest.raises(ModelError, match="nowhere"):
        weights(medium, "cluster=one_gpu", "teachers.ocr={model: ./nowhere}")


def test_roles_of_one_process_lie_on_one_card_also_where_they_share_nothing(medium):
    alone = ("cluster=one_gpu", "cluster.share_base=false")
    assert weights(medium, *alone) == pytest.approx((3 * 2.47 + 5.58) * 2 + 0.084 * 4, rel=0.01)
    with pytest.raises(PlacementError, match="role all roles together needs about"):
        check_memory(load("sd35_mopd", [medium, *alone]))


FULL = "student.lora=null"
BUFFERS = 384**2 * 1536 / 1e9
"""Position embeddings, in 1e9 numbers, of the 2.47 that the denoiser has: whole on each rank, and never trained."""
WEIGHTS = 2.47 - BUFFERS


def learner(medium, *overrides):
    return needs(load("sd35_mopd", [medium, "cluster=8gpu", *overrides]))[-1]


def on(placement, gpu=1):
    return f"cluster.learner={{{placement}, ranks: 4, resources: {{cpu: 4, gpu: {gpu}}}}}"


@pytest.mark.parametrize(
    ("placement", "part", "copies"),
    [
        ("backend: ddp", 1, 6),  # weight, gradient, what is reduced of it, two moments, average
        ("backend: fsdp2", 1 / 4, 5 / 4),
        ("backend: deepspeed, zero_stage: 1", 1, 1 + 1 + 1 + 3 / 4),  # weight, average, gradient; copy and moments
        ("backend: deepspeed, zero_stage: 2", 1, 1 + 1 + 1 / 4 + 3 / 4),
        ("backend: deepspeed, zero_stage: 3", 1 / 4, 6 / 4),
        ("backend: deepspeed, zero_stage: 2, cpu_offload: true", 1, 1 + 1),
    ],
)
def test_what_is_trained_is_spread_over_four_ranks(medium, placement, part, copies):
    full = learner(medium, FULL, on(placement))
    assert full.weights == pytest.approx(BUFFERS * 4)
    assert full.trained == pytest.approx(WEIGHTS * 4 * copies, rel=0.01)
    adapter = 8 * 24 * 2 * 32 * 1536 * 4 / 1e9
    lora = learner(medium, on(placement))
    assert lora.weights == pytest.approx((WEIGHTS * part + BUFFERS) * 2, rel=0.01)
    assert lora.trained == pytest.approx(adapter * copies)


@pytest.mark.parametrize(("placement", "copies"), [("backend: ddp", 6 + 5), ("backend: fsdp2", 5 / 4 + 4 / 4)])
def test_an_adapter_that_is_trained_too_is_counted_but_for_an_average(medium, placement, copies):
    adapter = 8 * 24 * 2 * 32 * 1536 * 4 / 1e9
    assert learner(medium, on(placement), "algorithm={name: dmd}").trained == pytest.approx(adapter * copies)


NFT = (
    "algorithm={name: diffusion_nft}",
    "rewards={look: {}}",
    "batch={images_per_task: 48, item_size: 6, images_per_prompt: 6}",
)
GRPO = ("algorithm={name: flow_grpo}", *NFT[1:])


@pytest.mark.parametrize(
    ("placement", "part", "copies"),
    [
        ("backend: ddp", 1, 6),
        ("backend: fsdp2", 1 / 4, 5 / 4),
        ("backend: deepspeed, zero_stage: 2", 1, 1 + 1 + 1 / 4 + 3 / 4),
        ("backend: deepspeed, zero_stage: 3", 1 / 4, 6 / 4),
    ],
)
def test_an_adapter_that_follows_is_one_more_copy_and_the_frozen_start_is_none(medium, placement, part, copies):
    """DiffusionNFT has `old` beside the student; it and Flow-GRPO compare with the start, their adapter off."""
    adapter = 8 * 24 * 2 * 32 * 1536 * 4 / 1e9
    old, none = learner(medium, *NFT, on(placement)), learner(medium, *GRPO, on(placement))
    assert none.trained == pytest.approx(adapter * copies)
    assert old.trained == pytest.approx(adapter * (copies + part)) and old.weights == none.weights
    again = learner(medium, *GRPO, on(placement), "student.lora.start=runs/before")
    assert again.trained == old.trained, "a start that is a LoRA is a copy"
    two_blocks = 2 / 24 * 3 / 4 if part < 1 else 0  # of what is spread, which the other three ranks hold
    assert old.working - none.working == pytest.approx(adapter * two_blocks)


@pytest.mark.parametrize(
    ("placement", "weights", "gradients"),
    [
        ("backend: ddp", 0, 0),
        ("backend: fsdp2", 2 / 24 * 3 / 4, 2 / 24 * 3 / 4),  # of two blocks, what the other three ranks hold
        ("backend: deepspeed, zero_stage: 2", 0, 0.5 / WEIGHTS),  # DeepSpeed's buffer of 5e8 numbers
        ("backend: deepspeed, zero_stage: 3", 2 / 24 * 3 / 4, 0.5 / WEIGHTS),
    ],
)
def test_what_is_spread_is_whole_for_two_blocks_at_a_time(medium, placement, weights, gradients):
    alone = learner(medium, FULL, "cluster.learner={ranks: 1, resources: {cpu: 4, gpu: 1}}").working
    found = learner(medium, FULL, on(placement)).working - alone
    assert found == pytest.approx(WEIGHTS * 4 * (weights + gradients), rel=0.01)


def test_ranks_without_a_card_have_all_weights_in_memory_before_they_spread_them(medium):
    small = "batch.item_size=1", "student.gradient_checkpointing=true", "ema=null"
    lora = learner(medium, *small, on("backend: fsdp2", gpu=0))
    assert lora.total == pytest.approx(2.47 * 4, rel=0.02), "float32, and an adapter"
    assert learner(medium, *small, on("backend: fsdp2")).total < 2.47 * 2


def test_a_full_student_that_does_not_fit_is_told_what_spreads_it(medium):
    config = load("sd35_mopd", [medium, "cluster=8gpu", FULL, "cluster.gpu_memory_gb=48"])
    with pytest.raises(PlacementError, match=r"role learner needs about .* cluster.learner.backend fsdp2"):
        check_memory(config)
