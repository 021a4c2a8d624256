"""Tokenizers small enough to ship: a caption word is one token, a quoted word falls into letters."""

import string

from transformers import CLIPTokenizer, T5Tokenizer

from opd_ray.world.captions import caption_words

MAX_TOKENS = 18
"""Length of both CLIP sequences and of the T5 sequence. The longest caption just fits."""
_END = "</w>"
_CHARACTERS = string.ascii_lowercase + string.digits + "".join(c for c in string.punctuation)


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer. Merges run from a word's end, so only whole caption words ever merge."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in _CHARACTERS:
        vocab.setdefault(character, len(vocab))
        vocab.setdefault(character + _END, len(vocab))
    merges: dict[tuple[str, str], None] = {}
    for word in caption_words():
        tail = word[-1] + _END
        for letter in reversed(word[:-1]):
            merges[letter, tail] = None
            tail = letter + tail
            vocab.setdefault(tail, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer: whole caption words, or single characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -2.0) for word in caption_words() if len(word) > 1]
    pieces += [(f"▁{character}", -5.0) for character in _CHARACTERS]
    pieces += [(character, -4.0) for character in _CHARACTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)
