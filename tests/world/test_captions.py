import random

import pytest

from opd_ray.world import captions, splits
from opd_ray.world.captions import Item, Meaning, parse
from opd_ray.world.vocabulary import MAX_TOKENS, clip_tokenizer, t5_tokenizer


@pytest.mark.parametrize(
    ("caption", "meaning"),
    [
        ("a photo of a circle", Meaning((Item(1, None, "circle"),))),
        ("three blue squares", Meaning((Item(3, "blue", "square"),))),
        (
            "a red circle and a green triangle",
            Meaning((Item(1, "red", "circle"), Item(1, "green", "triangle"))),
        ),
        (
            "a yellow square next to a circle",
            Meaning((Item(1, "yellow", "square"), Item(1, None, "circle"))),
        ),
        (
            "a red circle in the bottom right corner",
            Meaning((Item(1, "red", "circle"),), corner="bottom right"),
        ),
        ('a sign that says "bako"', Meaning(word="bako")),
        (
            'two red circles and the word "ibis"',
            Meaning((Item(2, "red", "circle"),), word="ibis"),
        ),
        ("a lovely picture of nothing", Meaning()),
    ],
)
def test_a_caption_says_what_it_says(caption, meaning):
    assert parse(caption) == meaning


@pytest.mark.parametrize("task", ["compose", "text", "mixed"])
def test_every_phrasing_parses_back(task):
    rng = random.Random(3)
    for _ in range(300):
        meaning = splits.training_meaning(task, rng)
        assert parse(captions.phrase(meaning, rng)) == meaning
        assert meaning.task == task


def test_look_captions_ask_for_nothing():
    rng = random.Random(3)
    for _ in range(200):
        assert parse(splits.training_caption(Meaning(), rng)) == Meaning()


def test_caption_words_are_single_tokens_and_quoted_words_fall_into_letters():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in captions.caption_words():
        assert len(clip.tokenize(word)) == 1, word
        assert len(t5.tokenize(word)) == 1, word
    for word in splits.all_words():
        letters = ['"', *word, '"']
        assert [token.removesuffix("</w>") for token in clip.tokenize(f'"{word}"')] == letters
        assert [token.removeprefix("▁") for token in t5.tokenize(f'"{word}"')] == letters


def test_every_prompt_fits_the_encoders():
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for task in ("compose", "text", "look", "mixed"):
        prompts = [row["prompt"] for row in splits.prompt_rows(task, "heldout", 200)]
        for ids in (*clip(prompts).input_ids, *t5(prompts).input_ids):
            assert len(ids) <= MAX_TOKENS
