"""What training may see and what it never sees: held-out words and combinations.

A combination is held out of pictures as well as of captions: a training caption that leaves
something open ("a circle and a square") is never drawn as a held-out combination either.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

from opd_ray.world.captions import (
    COLOURS,
    CORNERS,
    LETTERS,
    LOOK_ADJECTIVES,
    LOOK_NOUNS,
    LOOK_TAILS,
    SHAPES,
    VOWELS,
    Item,
    Meaning,
    caption_words,
    look_caption,
    phrase,
)

_SEED = 7
_HELD_PAIRS, _HELD_COUNTS, _HELD_CORNERS, _HELD_LOOKS = 14, 8, 10, 48
_HELD_WORD_SHARE = 0.2

Kind = tuple[str, str]
"""(colour, shape)"""


@dataclass(frozen=True)
class HeldOut:
    """The combinations and words that no training of base, specialist or student sees."""

    pairs: frozenset[frozenset[Kind]]
    counts: frozenset[tuple[int, str, str]]
    corners: frozenset[tuple[str, str, str]]
    looks: frozenset[tuple[str, str]]
    words: frozenset[str]

    def drawn(self, kinds: list[Kind], corners: list[str]) -> bool:
        """Whether a picture with these objects, one corner each, shows a held-out combination."""
        if len(kinds) == 1:
            return (*kinds[0], corners[0]) in self.corners
        if len(set(kinds)) == 1:
            return (len(kinds), *kinds[0]) in self.counts
        return any(frozenset(pair) in self.pairs for pair in combinations(set(kinds), 2))


def all_words() -> list[str]:
    """Every word that may be asked for: 3 or 4 letters, consonants and vowels in turn.

    The last two letters of a word are never the last two of a caption word. The CLIP tokenizers
    merge from a word's end, so no merge applies to such a word and it falls into its letters.
    """
    consonants = [letter for letter in LETTERS if letter not in VOWELS]
    endings = {word[-2:] for word in caption_words() if len(word) > 1}
    patterns = [
        (consonants, VOWELS, consonants),
        (VOWELS, consonants, VOWELS),
        (consonants, VOWELS, consonants, VOWELS),
        (VOWELS, consonants, VOWELS, consonants),
    ]
    words = ["".join(letters) for pattern in patterns for letters in product(*pattern)]
    return [word for word in words if word[-2:] not in endings]


@cache
def held_out() -> HeldOut:
    """The fixed held-out sets. The shipped prompt files are drawn from these."""
    rng = random.Random(_SEED)
    kinds = sorted(product(COLOURS, SHAPES))
    pairs = [frozenset(pair) for pair in combinations(kinds, 2)]
    words = all_words()
    return HeldOut(
        pairs=frozenset(rng.sample(pairs, _HELD_PAIRS)),
        counts=frozenset(rng.sample(sorted(product((2, 3, 4), COLOURS, SHAPES)), _HELD_COUNTS)),
        corners=frozenset(rng.sample(sorted(product(COLOURS, SHAPES, CORNERS)), _HELD_CORNERS)),
        looks=frozenset(rng.sample(sorted(product(LOOK_ADJECTIVES, LOOK_NOUNS)), _HELD_LOOKS)),
        words=frozenset(rng.sample(words, int(len(words) * _HELD_WORD_SHARE))),
    )


@cache
def training_words() -> tuple[str, ...]:
    """The words that training may use."""
    return tuple(word for word in all_words() if word not in held_out().words)


def is_held_out(meaning: Meaning) -> bool:
    """Whether the caption's own combination, or its word, is held out."""
    held = held_out()
    if meaning.word in held.words:
        return True
    kinds = [(item.colour or "", item.shape) for item in meaning.items]
    if len(kinds) == 2:
        return frozenset(kinds) in held.pairs
    if kinds and meaning.items[0].count > 1:
        return (meaning.items[0].count, *kinds[0]) in held.counts
    return bool(kinds) and (*kinds[0], meaning.corner or "") in held.corners


def _training_items(category: str, rng: random.Random) -> Meaning:
    kinds = [(rng.choice(COLOURS), rng.choice(SHAPES)) for _ in range(2)]
    first = Item(1, *kinds[0])
    if category == "single_object":
        corner = rng.choice([None, *CORNERS])
        return Meaning((Item(1, None, first.shape),), corner=corner)
    if category == "colors":
        return Meaning((first,))
    if category == "position":
        return Meaning((first,), corner=rng.choice(CORNERS))
    if category == "counting":
        colour = rng.choice([None, first.colour, first.colour])
        return Meaning((Item(rng.choice((2, 3, 4)), colour, first.shape),))
    if category == "two_object":
        shapes = rng.sample(SHAPES, 2)
        return Meaning(tuple(Item(1, None, shape) for shape in shapes))
    return Meaning(tuple(Item(1, *kind) for kind in kinds))


CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_CATEGORY_WEIGHTS = (1, 1, 4, 1, 3, 6)


def training_meaning(task: str, rng: random.Random) -> Meaning:
    """A random meaning of one task that training may see."""
    if task == "look":
        return Meaning()
    if task == "text":
        return Meaning(word=rng.choice(training_words()))
    while True:
        category = rng.choices(CATEGORIES, _CATEGORY_WEIGHTS)[0]
        if task == "mixed":
            category = rng.choice(("colors", "counting", "color_attr"))
        meaning = _training_items(category, rng)
        if task == "mixed":
            if any(item.count > 2 for item in meaning.items):
                continue
            meaning = Meaning(meaning.items, word=rng.choice(training_words()))
        same = len(meaning.items) == 2 and meaning.items[0] == meaning.items[1]
        if not same and not is_held_out(meaning):
            return meaning


def training_caption(meaning: Meaning, rng: random.Random) -> str:
    """A phrasing that training may see."""
    if meaning.task != "look":
        return phrase(meaning, rng)
    while True:
        pair = (rng.choice(LOOK_ADJECTIVES), rng.choice(LOOK_NOUNS))
        if pair not in held_out().looks:
            return look_caption(*pair, rng.choice(LOOK_TAILS))


def _held_compose(category: str, rng: random.Random) -> Meaning:
    held = held_out()
    if category == "counting":
        count, colour, shape = rng.choice(sorted(held.counts))
        return Meaning((Item(count, colour, shape),))
    if category == "position":
        colour, shape, corner = rng.choice(sorted(held.corners))
        return Meaning((Item(1, colour, shape),), corner=corner)
    pair = sorted(rng.choice(sorted(sorted(pair) for pair in held.pairs)))
    rng.shuffle(pair)
    return Meaning(tuple(Item(1, *kind) for kind in pair))


HELD_CATEGORIES = ("counting", "position", "color_attr")
"""Uncoloured captions name too little to hold a combination out, so they are in training alone."""


def held_out_caption(task: str, index: int, rng: random.Random) -> str:
    """A caption of one task whose word or combination training never sees."""
    held = held_out()
    if task == "look":
        adjective, noun = rng.choice(sorted(held.looks))
        return look_caption(adjective, noun, rng.choice(LOOK_TAILS))
    word = rng.choice(sorted(held.words))
    if task == "text":
        return phrase(Meaning(word=word), rng)
    if task == "compose":
        return phrase(_held_compose(HELD_CATEGORIES[index % len(HELD_CATEGORIES)], rng), rng)
    items = _held_compose("color_attr", rng).items
    return phrase(Meaning(items, word=word), rng)


def prompt_rows(task: str, split: str, count: int) -> list[dict[str, str]]:
    """The rows of a shipped prompt file; prompts repeat only where phrasings run out."""
    rng = random.Random(f"{_SEED} {task} {split}")
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    tries = 0
    while len(rows) < count:
        tries += 1
        if split == "heldout":
            prompt = held_out_caption(task, len(rows), rng)
        else:
            prompt = training_caption(training_meaning(task, rng), rng)
        if prompt in seen and tries < 20:
            continue
        seen.add(prompt)
        tries = 0
        rows.append({"prompt": prompt, "task": task})
    return rows
