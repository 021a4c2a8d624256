import json
import random

import pytest

from opd_ray.world import SPLITS, prompts_path, splits
from opd_ray.world.captions import LETTERS, parse
from opd_ray.world.dataset import example
from opd_ray.world.settings import BASE_RECIPE, Settings


def _rows(task, split):
    return [json.loads(line) for line in prompts_path(task, split).read_text().splitlines()]


def _words_and_looks(task, prompts):
    if task == "look":
        return {tuple(prompt.split()[1:3]) for prompt in prompts}
    return {parse(prompt).word for prompt in prompts}


@pytest.mark.parametrize(("task", "split"), SPLITS)
def test_shipped_prompts_are_the_ones_the_code_makes(task, split):
    rows = _rows(task, split)
    assert rows == splits.prompt_rows(task, split, len(rows))
    assert len(rows) >= (1024 if split == "heldout" else 3000)
    assert {row["task"] for row in rows} == {task}
    # compose: 8 counts, 10 corners and 14 pairs in all their phrasings; prompts repeat where those run out
    assert len({row["prompt"] for row in rows}) >= (500 if task == "compose" else 700)


@pytest.mark.parametrize("task", ["text", "look"])
def test_no_held_out_word_or_look_is_trained_on(task):
    train = [row["prompt"] for row in _rows(task, "train")]
    held = [row["prompt"] for row in _rows(task, "heldout")]
    assert not _words_and_looks(task, train) & _words_and_looks(task, held)


def test_held_out_compose_and_mixed_prompts_are_held_out_and_train_ones_are_not():
    assert not any(splits.is_held_out(parse(row["prompt"])) for row in _rows("compose", "train"))
    held = splits.held_out()
    for row in _rows("compose", "heldout"):
        assert splits.is_held_out(parse(row["prompt"]))
    for row in _rows("mixed", "heldout"):
        meaning = parse(row["prompt"])
        assert meaning.word in held.words
        kinds = [(item.colour, item.shape) for item in meaning.items]
        assert frozenset(kinds) in held.pairs


def test_no_training_picture_or_caption_shows_what_is_held_out():
    held = splits.held_out()
    rng = random.Random(5)
    for recipe in (BASE_RECIPE, Settings().last_recipe, Settings().unet_recipe):
        for _ in range(700):
            picture, captions = example(recipe, rng)
            kinds = [(one.colour, one.shape) for one in picture.objects]
            corners = [
                f"{'top' if one.y < 16 else 'bottom'} {'left' if one.x < 16 else 'right'}" for one in picture.objects
            ]
            assert not (kinds and held.drawn(kinds, corners))
            assert picture.word not in held.words
            assert not any(splits.is_held_out(parse(name)) for name in captions)


def test_mixed_captions_are_in_the_base_training_alone():
    assert BASE_RECIPE.tasks["mixed"] > 0
    assert "mixed" not in Settings().specialists and ("mixed", "train") not in SPLITS


def test_every_letter_and_object_stays_in_training():
    held = splits.held_out()
    assert set("".join(splits.training_words())) == set(LETTERS)
    assert 0.15 < len(held.words) / len(splits.all_words()) < 0.25
