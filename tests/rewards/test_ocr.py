"""Reading text in pictures: the formula by hand, edge cases, and 200 printed words."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from opd_ray.errors import ConfigError
from opd_ray.rewards import make_rewards, text_reader
from opd_ray.rewards.ocr import Ocr, OcrExact, plain, target_of
from opd_ray.rewards.raster import as_pixels, as_tensor
from opd_ray.rewards.text_reader import read, reading_order

WORDS = """
    acorn admiral almond anchor antler apricot arrow badger bagpipe balcony bamboo basin beaver beetle biscuit blanket
    blossom bonnet boulder bracelet bramble bronze buffalo butter cabbage cactus camel canary canyon carpet cashew cedar
    cellar chalk cheetah chestnut chimney cinnamon cobalt coconut comet copper coral cottage cradle crater cricket
    crystal curtain cushion cypress daisy dolphin donkey drizzle dungeon eagle easel elbow ember emerald falcon fennel
    ferret fiddle flannel flute fountain fungus garlic gazelle geyser ginger glacier goblet granite grape gravel hammock
    hazel helmet hermit hickory hornet hurdle iceberg igloo indigo island ivory jackal jasmine jigsaw juniper kayak
    kernel kettle kidney koala ladder lagoon lantern lavender leather lemon leopard lettuce lizard lobster magnet mallet
    mango maple marble meadow melon mirror mitten monsoon mosaic muffin mussel mustard napkin nectar needle nettle
    nickel nutmeg oasis olive onion orchard ostrich otter oyster paddle panther parsley parrot peach peanut pebble
    pelican pepper pigeon pillow pirate pliers plum pollen poplar possum prairie pretzel prism puddle quartz quiver
    rabbit raccoon radish raisin ribbon rubble rudder saddle saffron sapphire satchel scallop scarf shovel shrimp silver
    sparrow spinach squid statue stirrup sulphur swallow teapot thimble thistle thunder timber toffee topaz tortoise
    tractor trellis trumpet tulip tundra turnip tweed valley velvet vinegar
""".split()  # noqa: SIM905
INKS = [
    ("black", "white"),
    ("white", "#142878"),
    ("#c81414", "#f0e6c8"),
    ("#fadc1e", "#1e1e1e"),
    ("#145a28", "#bedcbe"),
]


def printed(text: str, size: int, ink=("black", "white"), middle=(0.5, 0.5), width=0.85):
    """[3, size, size] with a text of this share of the picture's width around a place in it."""
    picture = Image.new("RGB", (size, size), ink[1])
    longest = max(text.split("\n"), key=len)
    font = ImageFont.load_default(100)
    font = ImageFont.load_default(min(100 * width * size / font.getlength(longest), 0.4 * size))
    place = (middle[0] * size, middle[1] * size)
    ImageDraw.Draw(picture).text(place, text, font=font, fill=ink[0], anchor="mm", align="center")
    return as_tensor(np.asarray(picture))


def scores_of_words(count: int) -> tuple[list[float], list[float], list[float]]:
    """`ocr` and `ocr_exact` of words printed at 64 to 512 pixels, and `ocr` of the same pictures with other words."""
    ocr, exact = Ocr(), OcrExact()
    right, exactly, wrong = [], [], []
    for i in range(count):
        size = round(64 * 8 ** (i * 37 % count / (count - 1)))  # each size once, in no order that the words know
        images = printed(WORDS[i], size, INKS[i % 5], (0.5, 0.3 + 0.4 * (i % 3) / 2))[None]
        right += ocr(images, [f'a poster that says "{WORDS[i]}"']).tolist()
        exactly += exact(images, [f'a poster that says "{WORDS[i]}"']).tolist()
        wrong += ocr(images, [f'a poster that says "{WORDS[(i + 100) % 200]}"']).tolist()
    return right, exactly, wrong


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.verify)])
def test_words_are_read(count) -> None:
    assert len(set(WORDS)) == 200
    right, exactly, wrong = scores_of_words(count)
    assert mean(right) >= 0.95
    assert mean(exactly) >= 0.95
    assert mean(wrong) <= 0.2
    assert max(wrong) < min(right)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('A "Big SALE" sign', "bigsale"),
        ('"one" and "two"', "one"),
        ('says "  "', ""),
        ('says ""', ""),
        ("no quotes", ""),
        ('a 12" pizza', ""),
        ("a “typographic” one", ""),
        ("it's 'single'", ""),
        ("", ""),
    ],
)
def test_the_target_is_between_the_first_two_double_quotes(prompt: str, target: str) -> None:
    assert target_of(prompt) == target


@pytest.mark.parametrize(
    ("recognised", "target", "score", "exact"),
    [
        ("hello", "hello", 1.0, 1.0),
        ("hello", "hallo", 0.8, 0.8),  # one of five
        ("xhellox", "hello", 1.0, 1 - 2 / 7),  # two letters too many
        ("hell", "hello", 0.8, 0.8),
        ("", "hello", 0.0, 0.0),
        ("completely different", "hi", 0.0, 1 - 19 / 20),  # never below 0: 19 edits keep one i
        ("helo", "hello", 0.8, 0.8),
        ("hellohello", "hello", 1.0, 0.5),
    ],
)
def test_the_formulas_by_hand(recognised: str, target: str, score: float, exact: float) -> None:
    assert Ocr.score(recognised, target) == pytest.approx(score)
    assert OcrExact.score(recognised, target) == pytest.approx(exact)


def test_spaces_and_case_do_not_count() -> None:
    assert plain(" Spring  Collection\t2024 ") == "springcollection2024"


def test_prompts_without_a_text_are_nan_and_others_keep_their_places() -> None:
    images = torch.stack([printed("planet", 128), printed("planet", 128), printed("kitchen", 128)])
    prompts = ["a dog", 'says "planet"', 'says "kitchen"']
    for reward in (Ocr(), OcrExact()):
        scores = reward(images, prompts)
        assert scores.dtype == torch.float32
        assert math.isnan(scores[0])
        assert scores[1:].tolist() == [1.0, 1.0]
        assert reward(images[:1], ["a dog"]).isnan().all()


def test_an_empty_picture_reads_as_nothing() -> None:
    assert read(as_pixels(torch.rand(1, 3, 16, 16) * 0 + 0.5)) == [[]]
    assert Ocr()(torch.ones(2, 3, 64, 64), ['says "word"'] * 2).tolist() == [0.0, 0.0]


def test_text_beside_the_target_costs_the_exact_score_alone() -> None:
    images = printed("planet\nkitchen", 256)[None]
    prompt = ['says "planet"']
    assert Ocr()(images, prompt).item() == 1.0
    assert OcrExact()(images, prompt).item() == pytest.approx(6 / 13)  # seven letters too many


def test_lines_are_read_from_the_top_and_words_of_a_line_from_the_left() -> None:
    images = printed("spring\ncollection\nplanet", 512)[None]
    assert plain("".join(read(as_pixels(images))[0])) == "springcollectionplanet"
    wide = torch.ones(3, 256, 768)
    wide[:, :, 512:] = printed("kitchen", 256, middle=(0.5, 0.5))
    wide[:, :, :256] = printed("planet", 256, middle=(0.5, 0.56))  # its top is lower than that of its neighbour
    assert "".join(read(as_pixels(wide[None]))[0]) == "planetkitchen"


def test_rows_by_hand() -> None:
    def box(left: float, top: float, right: float, bottom: float):
        return [[left, top], [right, top], [right, bottom], [left, bottom]]

    # Tops 15 pixels apart in a row 60 high; then a row below, the right one of it first in the list.
    assert reading_order(
        [box(200, 10, 300, 70), box(0, 25, 100, 85), box(90, 100, 190, 150), box(0, 105, 80, 155)]
    ) == [
        1,
        0,
        3,
        2,
    ]
    assert reading_order([box(0, 0, 10, 10)]) == [0]
    tilted = [[[50, 0], [90, 20], [85, 30], [45, 10]], [[0, 2], [40, 2], [40, 14], [0, 14]]]
    assert reading_order(tilted) == [1, 0]


def test_both_rewards_read_a_batch_once(monkeypatch) -> None:
    counted = []
    lines = text_reader._lines
    monkeypatch.setattr(text_reader, "_lines", lambda *given: counted.append(1) or lines(*given))
    images = torch.stack([printed("planet", 96), printed("kitchen", 96)])
    prompts = ['"planet"', '"kitchen"']
    text_reader._reader.cache_clear()
    made = make_rewards({"ocr": {}, "ocr_exact": {}})
    assert [reward(images.clone(), prompts).tolist() for reward in made.values()] == [[1.0, 1.0]] * 2
    assert len(counted) == 2
    made["ocr"](images.flip(0), prompts)
    assert len(counted) == 4
    text_reader._reader.cache_clear()


def test_sessions_have_the_roles_threads_and_do_not_spin() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        reader = text_reader._engine(torch.get_num_threads())
        reader(as_pixels(printed("planet", 64)[None])[0])
        for part in (reader.text_det, reader.text_rec):
            options = part.session.session.get_session_options()
            assert options.intra_op_num_threads == 2
            assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    finally:
        torch.set_num_threads(threads)


def test_it_needs_no_network(monkeypatch) -> None:
    import socket

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert text_reader._engine(1)(as_pixels(printed("planet", 64)[None])[0]).txts == ("planet",)


def test_a_missing_reader_is_refused_with_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"ocr and ocr_exact need rapidocr: pip install 'opd-ray\[ocr\]'"):
        Ocr()


@pytest.mark.parametrize("reward", [Ocr, OcrExact])
def test_probes_rank(reward) -> None:
    scorer = reward()
    for probe in scorer.probes():
        images, prompts = zip(probe.better, probe.worse, strict=True)
        better, worse = scorer(torch.stack(images), list(prompts)).tolist()
        assert better == 1.0
        assert worse < 0.5
