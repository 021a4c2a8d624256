"""English captions: their grammar, and the parser that says what a caption asks for.

A caption alone decides what its picture must show: scorers see images and captions, never scenes.
"""

import random
import re
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
COUNTS = ("a", "two", "three", "four")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
LETTERS = "aeioubklmnrst"
VOWELS = "aeiou"

_PREFIXES = (
    "a photo of ", "a picture of ", "a drawing of ", "an image of ", "a painting of ", "a print of ",
    "a scene of ", "a view of ", "a poster of ", "a design of ",
)  # fmt: skip
_JOINS = ("and", "with", "next to", "beside")
_CORNER_PHRASES = ("at the {0}", "in the {0}", "in the {0} corner")
# The word always comes first, at the same tokens: the CLIP encoders know absolute places, so a
# letter's place in the word need not be learned for every phrasing.
_TEXT_PHRASES = (
    'the word "{0}"',
    'the word "{0}" in a photo',
    'the word "{0}" in a picture',
    'the word "{0}" on a sign',
    'the word "{0}" that a sign says',
    'the word "{0}" on a poster',
    'the word "{0}" on a label',
    'the text "{0}"',
)
_MIXED_JOINS = ("and", "with", "beside")
LOOK_ADJECTIVES = (
    "lovely", "calm", "pretty", "gentle", "pleasant", "dreamy", "quiet", "charming", "beautiful",
    "graceful", "peaceful", "elegant", "tender", "delightful", "cosy", "tasteful",
)  # fmt: skip
LOOK_NOUNS = (
    "picture", "photo", "image", "painting", "scene", "view", "poster", "drawing", "mood", "design",
    "print", "composition",
)  # fmt: skip
LOOK_TAILS = (
    "", "of something", "of nothing", "of things", "for a wall", "for a home", "for a friend",
    "to look at", "to enjoy", "to keep", "in good taste", "with style", "with care", "full of light",
    "full of mood", "full of peace", "in one moment", "by a master", "by an artist", "by a friend",
    "from memory", "from a dream", "at dawn", "at dusk",
)  # fmt: skip

_ITEM = re.compile(r"\b(?:(a|an|two|three|four) )?(?:(red|green|blue|yellow) )?(circle|square|triangle)s?\b")
_WORD = re.compile(r'"([a-z]+)"')
_CORNER = re.compile(r"\b(top|bottom) (left|right)\b")


@dataclass(frozen=True)
class Item:
    """``count`` objects of one shape; a colour of None leaves the colour open."""

    count: int
    colour: str | None
    shape: str


@dataclass(frozen=True)
class Meaning:
    """What a caption asks for. With neither items nor a word it is a ``look`` caption."""

    items: tuple[Item, ...] = ()
    corner: str | None = None
    word: str | None = None

    @property
    def task(self) -> str:
        """The task of the caption: compose, text, look or mixed."""
        if self.items and self.word:
            return "mixed"
        if self.items:
            return "compose"
        return "text" if self.word else "look"

    @property
    def category(self) -> str:
        """GenEval's name for what a compose caption tests; the task for any other caption."""
        if self.task != "compose":
            return self.task
        first = self.items[0]
        if self.corner:
            return "position"
        if len(self.items) == 2:
            return "color_attr" if first.colour else "two_object"
        if first.count > 1:
            return "counting"
        return "colors" if first.colour else "single_object"


def parse(caption: str) -> Meaning:
    """Read a caption's meaning back. Every caption of `phrase` parses to the meaning it came from."""
    text = caption.lower()
    word = _WORD.search(text)
    outside = _WORD.sub(" ", text)
    items = tuple(
        Item(COUNTS.index(count) + 1 if count in COUNTS else 1, colour or None, shape)
        for count, colour, shape in _ITEM.findall(outside)
    )
    corner = _CORNER.search(outside) if len(items) == 1 else None
    return Meaning(
        items=items,
        corner=f"{corner[1]} {corner[2]}" if corner else None,
        word=word[1] if word else None,
    )


def name_item(item: Item) -> str:
    """An item in words, such as "two red circles"."""
    plural = "s" if item.count > 1 else ""
    colour = f"{item.colour} " if item.colour else ""
    return f"{COUNTS[item.count - 1]} {colour}{item.shape}{plural}"


def phrase(meaning: Meaning, rng: random.Random) -> str:
    """One of the phrasings of a compose, text or mixed meaning."""
    if meaning.task == "text":
        return rng.choice(_TEXT_PHRASES).format(meaning.word)
    names = [name_item(item) for item in meaning.items]
    if meaning.task == "mixed":
        # No longer phrasing: with a word the caption only just fits the encoders.
        return f'the word "{meaning.word}" {rng.choice(_MIXED_JOINS)} {" and ".join(names)}'
    else:
        body = f" {rng.choice(_JOINS)} ".join(names)
    if meaning.corner:
        body += " " + rng.choice(_CORNER_PHRASES).format(meaning.corner)
    return rng.choice(_PREFIXES) + body


def look_caption(adjective: str, noun: str, tail: str) -> str:
    """A generic caption that asks for nothing but a pleasing picture."""
    article = "an" if adjective[0] in VOWELS else "a"
    return f"{article} {adjective} {noun} {tail}".strip()


def caption_words() -> list[str]:
    """Every word a caption may contain outside quotes, sorted. Each is one token."""
    texts = [*_PREFIXES, *_JOINS, *_CORNER_PHRASES, *_TEXT_PHRASES, *_MIXED_JOINS, *CORNERS]
    texts += [*LOOK_ADJECTIVES, *LOOK_NOUNS, *LOOK_TAILS, *COLOURS, *COUNTS, "an"]
    texts += [*SHAPES, *(shape + "s" for shape in SHAPES)]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})
