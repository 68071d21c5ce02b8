"""Small CLIP and T5 tokenizers made from a list of words; saved, they are ordinary tokenizer folders."""

import json
import struct
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

PUNCTUATION = ".,;:!?'\"()-"
CLIP_MAX_LENGTH = 77
T5_MAX_LENGTH = 512


def build_clip_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """Makes a byte-level BPE tokenizer in which every given word is one token.

    Unknown words are spelt in bytes, so no text fails. As in CLIP the padding token is the end token, and a text model
    with this tokenizer's `eos_token_id` in its configuration pools at the first one.

    Args:
        words: The vocabulary, letters only; case does not matter.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # Merges learnt until nothing is left to merge replay to one token for each word they were learnt on.
    bpe.train_from_iterator(
        _clean(words),
        trainers.BpeTrainer(vocab_size=2**20, min_frequency=1, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet] + [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_MAX_LENGTH)


def build_t5_tokenizer(words: Iterable[str]) -> T5Tokenizer:
    """Makes a unigram tokenizer in which every given word is one token; what it does not know becomes `<unk>`.

    Ids follow T5: 0 is padding, 1 the end, 2 unknown.

    Args:
        words: The vocabulary, letters only; case does not matter.
    """
    pieces = ["▁", *("▁" + word for word in _clean(words)), *PUNCTUATION]
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [(piece, -1.0) for piece in pieces]
    return T5Tokenizer(
        vocab=vocabulary, extra_ids=0, model_max_length=T5_MAX_LENGTH, _spm_precompiled_charsmap=_lower_case_charsmap()
    )


def _clean(words: Iterable[str]) -> list[str]:
    return sorted({word.lower() for word in words})


def _lower_case_charsmap() -> bytes:
    """The normalisation table of SentencePiece (a Darts-clone double array, then its strings) that maps A..Z to a..z.

    A T5 tokenizer keeps no other normaliser, and without this one a capital letter would be an unknown word.
    """
    children, leaves = 0x100, 0x200
    units = [0] * (leaves + 128)
    units[0] = children << 10
    strings = b""
    for upper in range(ord("A"), ord("Z") + 1):
        has_leaf = 1 << 8
        units[children ^ upper] = (children ^ leaves) << 10 | has_leaf | upper
        units[leaves ^ upper] = 1 << 31 | len(strings)
        strings += chr(upper).lower().encode() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + strings
