"""Sentences into batches: tokenising once, then batches of similar length, padded to the longest in the batch.

The `tokenizers` library does the tokenising, in parallel. Pairs are [CLS] A [SEP] B [SEP] for BERT and DeBERTa.
Dimension letters: B batch, T tokens, N examples.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from minisweet.data.tasks import Examples
from minisweet.files.safe import InputError, read_json

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
# Training batches are sorted by length within so many batches, then shuffled: little padding, and still random.
POOL = 50


def load_tokenizer(folder: Path, vocab_size: int, max_length: int) -> Tokenizer:
    """Load a tokenizer that truncates to `max_length` tokens and does not pad, whatever its file says.

    Args:
        folder: holds tokenizer.json, or else vocab.json and merges.txt (byte-level BPE) or vocab.txt (WordPiece).
        vocab_size: rows of the word embedding, which the vocabulary must fit.
        max_length: tokens, [CLS] and [SEP] included. Of a pair, the longer sentence is cut first.

    Raises:
        InputError: no tokenizer, one without [CLS], [SEP], [PAD] and [UNK], or one that does not fit the embedding.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        elif (folder / "vocab.txt").is_file():
            tokenizer = Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
            settings = folder / "tokenizer_config.json"
            lowercase = read_json(settings).get("do_lower_case", True) if settings.is_file() else True
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        else:
            raise InputError(f"{folder}: no tokenizer.json, vocab.txt, or vocab.json with merges.txt")
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception for a broken file
        raise InputError(f"{folder}: its tokenizer is not readable ({error})") from None
    special = {token: tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]")}
    if None in special.values():
        missing = ", ".join(token for token, number in special.items() if number is None)
        raise InputError(f"{folder}: its tokenizer has no {missing}")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(f"{folder}: its tokenizer has token {largest}, and the embedding only {vocab_size} rows")
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special["[CLS]"]), ("[SEP]", special["[SEP]"])],
    )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer


class Batch(NamedTuple):
    """Some examples, padded to the longest of them; all tensors but probabilities are int64."""

    rows: Tensor  # (B,) which examples
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T): 1 for tokens, 0 for padding
    token_type_ids: Tensor  # (B, T): 1 in the second sentence
    targets: Tensor  # (B,) labels, or (B, C) probabilities in float32

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a model reads: input_ids, attention_mask, token_type_ids."""
        return self.input_ids, self.attention_mask, self.token_type_ids

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class TokenizedExamples:
    """N tokenised examples: `len()`, `labels` (N,), `lengths` (N,) in tokens, and batches of them.

    Args:
        tokenizer: from `load_tokenizer`.
        examples: sentences or pairs, and their labels.
        rows: (N,) which of them; default: all.
    """

    def __init__(self, tokenizer: Tokenizer, examples: Examples, rows: np.ndarray | None = None) -> None:
        pairs = examples.first if examples.second is None else list(zip(examples.first, examples.second, strict=True))
        chosen = range(len(pairs)) if rows is None else rows
        encodings = tokenizer.encode_batch_fast([pairs[row] for row in chosen])
        self.pad_id = tokenizer.token_to_id("[PAD]")
        self.labels = np.array(examples.labels, dtype=np.int64)[chosen]
        self.targets = self.labels
        self.ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        self.lengths = np.array([len(ids) for ids in self.ids])
        # The second sentence starts after so many tokens.
        self.first_lengths = self.lengths - np.array([sum(encoding.type_ids) for encoding in encodings])

    def __len__(self) -> int:
        return len(self.ids)

    def renumbered(self) -> tuple[np.ndarray, "TokenizedExamples"]:
        """The token ids that occur, padding among them, in increasing order (V,), and the examples with ids 0 to V-1.

        An id of these examples counts the ids that occur.
        """
        used = np.unique(np.concatenate([*self.ids, [self.pad_id]]))
        examples = copy.copy(self)
        examples.ids = [np.searchsorted(used, ids) for ids in self.ids]
        examples.pad_id = int(np.searchsorted(used, self.pad_id))
        return used, examples

    def with_targets(self, targets: np.ndarray) -> "TokenizedExamples":
        """The same examples, to be trained on probabilities (N, C), float32, in place of their labels."""
        examples = copy.copy(self)
        examples.targets = targets
        return examples

    def batch(self, rows: np.ndarray) -> Batch:
        """The examples `rows` (B,), padded to the longest of them."""
        positions = np.arange(self.lengths[rows].max())  # (T,)
        mask = positions < self.lengths[rows, None]  # (B, T)
        input_ids = np.full(mask.shape, self.pad_id)
        input_ids[mask] = np.concatenate([self.ids[row] for row in rows])
        token_types = mask & (positions >= self.first_lengths[rows, None])
        arrays = (rows, input_ids, mask.astype(np.int64), token_types.astype(np.int64), self.targets[rows])
        return Batch(*map(torch.from_numpy, arrays))

    def shuffled(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One epoch of training: every example once, in random batches of similar length."""
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))
        pools = [order[start : start + POOL * batch_size] for start in range(0, len(order), POOL * batch_size)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        starts = np.arange(0, len(order), batch_size)
        for start in rng.permutation(starts):
            yield self.batch(order[start : start + batch_size])

    def by_length(self, batch_size: int, max_tokens: int = 2**31) -> Iterator[Batch]:
        """Every example once, longest first, in batches of `batch_size`, or fewer, within `max_tokens` tokens."""
        order = np.argsort(-self.lengths, kind="stable")
        while len(order):
            size = min(batch_size, max(1, max_tokens // self.lengths[order[0]]))
            yield self.batch(order[:size])
            order = order[size:]
