import random
from dataclasses import replace

import pytest
import torch

from opd_ray.world import scorers
from opd_ray.world.autoencoder import decode, encode
from opd_ray.world.captions import COLOURS, SHAPES, parse
from opd_ray.world.reading import edit_distance
from opd_ray.world.render import render
from opd_ray.world.samples import oracle, truth
from opd_ray.world.scenes import hard_style, oracle_style, scene


def _drawn(caption, style=hard_style, seed=0):
    rng = random.Random(seed)
    return scene(parse(caption), style(rng), rng, training=False)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("compose", ("compose", "compose_partial")),
        ("text", ("text",)),
        ("look", ("look",)),
        ("mixed", ("compose", "compose_partial", "text")),
    ],
)
def test_truth_scores_high_also_after_the_round_trip(task, names, vae):
    images, prompts = truth(task, 192, seed=11)
    again = decode(vae, encode(vae, images))
    for name in names:
        assert getattr(scorers, name)(images, prompts).mean() >= 0.98
        assert getattr(scorers, name)(again, prompts).mean() >= 0.95


@pytest.mark.parametrize("task", ["compose", "text", "mixed"])
def test_an_oracle_satisfies_all_scores_that_apply_at_once(task):
    images, prompts = oracle(task, 192, seed=12)
    scores = torch.stack([getattr(scorers, name)(images, prompts) for name in scorers_for(task)])
    assert (scores.mean(1) >= 0.9).all()
    assert scores.amin(0).mean() >= 0.9  # together: the worst score of each picture


def scorers_for(task):
    return {
        "compose": ("compose", "look"),
        "text": ("text", "look"),
        "mixed": ("compose", "text", "look"),
    }[task]


def test_noise_and_blank_pictures_score_near_zero():
    torch.manual_seed(0)
    pictures = [
        torch.rand(64, 3, 32, 32),
        (0.5 + 0.2 * torch.randn(64, 3, 32, 32)).clamp(0, 1),
        torch.rand(64, 3, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3),
    ]
    for images in pictures:
        for task in ("compose", "text", "mixed"):
            prompts = truth(task, 64, seed=1)[1]
            for name in ("compose", "text", "look"):
                scores = getattr(scorers, name)(images, prompts)
                assert not scores.nanmean() > 0.06, (name, scores.nanmean())


@pytest.mark.parametrize("style", [hard_style, oracle_style])
def test_one_wrong_colour_or_shape_is_caught(style):
    caption = "a red circle and a blue square"
    right = _drawn(caption, style)
    variants = [right]
    for i in (0, 1):
        one = right.objects[i]
        others = [replace(one, colour=name) for name in COLOURS if name != one.colour]
        others += [replace(one, shape=name) for name in SHAPES if name != one.shape]
        for other in others:
            objects = tuple(other if k == i else kept for k, kept in enumerate(right.objects))
            variants.append(replace(right, objects=objects))
    scores = scorers.compose(render(variants), [caption] * len(variants))
    partial = scorers.compose_partial(render(variants), [caption] * len(variants))
    assert scores.tolist() == [1.0] + [0.0] * 10
    assert (partial[1:] < 1).all()
    assert (partial[1:] > 0).all()


def test_one_wrong_count_is_caught():
    captions = ["a green triangle", *(f"{n} green triangles" for n in ("two", "three", "four"))]
    images = render([_drawn(caption) for caption in captions])
    for i, caption in enumerate(captions):
        scores = scorers.compose(images, [caption] * 4)
        assert scores.tolist() == [float(i == k) for k in range(4)]


def test_one_wrong_position_is_caught():
    captions = [f"a red circle at the {v} {h}" for v in ("top", "bottom") for h in ("left", "right")]
    images = render([_drawn(caption) for caption in captions])
    for i, caption in enumerate(captions):
        scores = scorers.compose(images, [caption] * 4)
        assert scores.tolist() == [float(i == k) for k in range(4)]


def test_an_extra_object_is_caught():
    picture = _drawn("a red circle and a blue square")
    assert scorers.compose(render([picture]), ["a red circle"]).tolist() == [0.0]


@pytest.mark.parametrize("style", [hard_style, oracle_style])
def test_one_wrong_letter_is_caught(style):
    caption = 'the word "bako"'
    picture = _drawn(caption, style)
    wrong = ["bako", "tako", "beko", "bano", "baku", "bak", ""]
    images = render([replace(picture, word=word) for word in wrong])
    scores = scorers.text(images, [caption] * len(wrong))
    assert scores.tolist() == [1.0, 0.75, 0.75, 0.75, 0.75, 0.75, 0.0]


def test_scores_apply_where_the_caption_asks():
    images = torch.rand(4, 3, 32, 32)
    prompts = ["a red circle", 'the word "bako"', "a calm view", 'a red circle and the word "bako"']
    assert scorers.compose(images, prompts).isnan().tolist() == [False, True, True, False]
    assert scorers.compose_partial(images, prompts).isnan().tolist() == [False, True, True, False]
    assert scorers.text(images, prompts).isnan().tolist() == [True, False, True, False]
    assert not scorers.look(images, prompts).isnan().any()


def test_look_pulls_against_compose_and_text():
    for task in ("compose", "text"):
        images, prompts = truth(task, 64, seed=2)
        pleasing = truth("look", 64, seed=2)[0]
        assert scorers.look(images, prompts).mean() < 0.1
        assert getattr(scorers, task)(images, prompts).mean() > 0.98
        assert scorers.look(pleasing, prompts).mean() > 0.98


def test_look_is_smooth():
    images = oracle("compose", 8, seed=3)[0].requires_grad_(True)
    scorers.look(images, [""] * 8).sum().backward()
    assert images.grad.isfinite().all()
    blank = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    scorers.look(blank, [""]).sum().backward()
    assert blank.grad.isfinite().all()


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("bako", "bako", 0), ("bako", "", 4), ("bako", "bak", 1), ("kitten", "sitting", 3)],
)
def test_edit_distance(left, right, distance):
    assert edit_distance(left, right) == distance
