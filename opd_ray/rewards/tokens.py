"""Tokenizers, from a hub id or a folder."""

import logging
from typing import Any

from opd_ray.errors import ModelError
from opd_ray.models.checkpoint import refusing
from opd_ray.models.download import Source

__all__ = ["load_tokenizer"]

SETS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
"""Files of which one set makes a tokenizer. Without any, transformers makes one that knows no word and says nothing."""
BESIDE = "tokenizer_config.json"


def load_tokenizer(what: str, kind: Any, place: str) -> Any:
    """The tokenizer of a folder or hub repository; nothing else of it is downloaded.

    Args:
        what: for messages: whose tokenizer it is.
        kind: a class of transformers.
        place: hub id or folder.

    Raises:
        ModelError: no such place, or no tokenizer in it.
    """
    what = f"{what} {place!r}"
    source = Source(what, place)
    folder = source.fetch(BESIDE, *(file for files in SETS for file in files))
    if not any(all((folder / file).is_file() for file in files) for files in SETS):
        raise ModelError(f"{what} holds no tokenizer: none of {', or '.join(' with '.join(files) for files in SETS)}")
    logging.getLogger("transformers.tokenization_utils_base").setLevel(
        logging.ERROR
    )  # it prints texts that are cut off
    with refusing(f"{what} has no tokenizer that can be loaded as {kind.__name__}"):
        return kind.from_pretrained(folder)
