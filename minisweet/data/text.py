"""Sentences into batches (B) of tokens (T): N examples are tokenised once, and padded to the longest of a batch."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer, processors
from torch import Tensor

from minisweet.base.safe import InputError, read_json
from minisweet.data.rows import Examples

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
SHORTEST = 8  # tokens to which examples may be cut: below, a pair has hardly a word of each
# All that says which special tokens there are, and where: these names, `TokenizedExamples`, and BertProcessing below.
# RoBERTa has <s> A </s></s> B </s>, <pad>, <unk>, one token type, and RobertaProcessing.
SPECIAL = START, END, PAD, UNKNOWN = "[CLS]", "[SEP]", "[PAD]", "[UNK]"
PROBE = "It's a test", "caf\u00e9 \u6f22 \U0001f600 qxzv"  # words, and what few vocabularies hold
PANICKING = b'"Precompiled"', b'"FixedLength"'  # parts, strange to BERT and DeBERTa, that panic where they are wrong
TRIAL = f"import sys, tokenizers; tokenizers.Tokenizer.from_file(sys.argv[1]).encode(*{PROBE!a})"
POOL = 50  # batches: examples are sorted by length within so many, for little padding, then the batches are shuffled


def load_tokenizer(folder: Path, vocab_size: int, max_length: int, positions: int = 2**31) -> Tokenizer:
    """Load a tokenizer that truncates to `max_length` tokens, [CLS] and [SEP] among them, and does not pad.

    Pairs are cut in `TokenizedExamples`.

    `folder` holds tokenizer.json, or else vocab.json and merges.txt (byte-level BPE) or vocab.txt (WordPiece). Raises
    InputError for a tokenizer that is missing, does not tokenise or lacks a special token, for a vocabulary that does
    not fill nine tenths of `vocab_size` rows, or more than all, and for a length not from 8 to `positions`.
    """
    if type(max_length) is not int or not SHORTEST <= max_length <= positions:
        raise InputError(f"{folder}: max_length is {max_length!r:.80}, should be from {SHORTEST} to {positions} tokens")
    try:
        tokenizer = _read_tokenizer(folder)
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL if token not in vocabulary]:
            raise ValueError(f"it has no {', '.join(missing)}")
        if (largest := max(vocabulary.values())) >= vocab_size:
            raise ValueError(f"it has token {largest}, and the embedding only {vocab_size} rows")
        if 10 * len(vocabulary) < 9 * vocab_size:
            raise ValueError(f"it has {len(vocabulary)} tokens for an embedding of {vocab_size} rows")
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.BertProcessing((END, vocabulary[END]), (START, vocabulary[START]))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        tokenizer.encode(*PROBE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and for a panic what is no Exception at all
        raise InputError(f"{folder}: its tokenizer is not usable ({error!s:.200})") from None
    return tokenizer


def _read_tokenizer(folder: Path) -> Tokenizer:
    whole, words, pieces, merges, settings = (folder / name for name in TOKENIZER_FILES)
    if whole.is_file():
        if any(map(whole.read_bytes().count, PANICKING)):  # tried apart: a panic prints a page on standard error
            trial = subprocess.run([sys.executable, "-c", TRIAL, whole], capture_output=True)
            if trial.returncode:
                raise ValueError(trial.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        return Tokenizer.from_file(str(whole))
    if pieces.is_file() and merges.is_file():
        made = ByteLevelBPETokenizer.from_file(str(pieces), str(merges))
    elif words.is_file():
        lowercase = read_json(settings).get("do_lower_case", True) if os.path.lexists(settings) else True
        made = BertWordPieceTokenizer.from_file(str(words), lowercase=lowercase)
    else:
        raise ValueError("there is no tokenizer.json, vocab.txt, or vocab.json with merges.txt")
    return Tokenizer.from_str(made.to_str())


def longest_first(a: int, b: int, room: int) -> tuple[int, int]:
    """How many of a sentence's `a` and of another's `b` tokens fit into `room`: the longer is cut first, then both."""
    short = min(a, b, room // 2)
    return (short, min(b, room - short)) if a <= b else (min(a, room - short), short)


class Batch(NamedTuple):
    """Some examples, padded to the longest of them; all tensors but probabilities are int64."""

    rows: Tensor  # (B,) which examples
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T): 1 for tokens, 0 for padding
    token_type_ids: Tensor  # (B, T): 1 in the second sentence
    targets: Tensor | None = None  # (B,) labels, or (B, C) probabilities in float32, each row times what it counts

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a model reads: input_ids, attention_mask, token_type_ids."""
        return self.input_ids, self.attention_mask, self.token_type_ids

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; to a GPU it goes from pinned memory, and nobody waits for it."""
        to_gpu = torch.device(device).type == "cuda"
        tensors = (tensor.pin_memory() if to_gpu else tensor for tensor in self if tensor is not None)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


class TokenizedExamples:
    """N tokenised examples, by default all: `labels` (N,) or None, and `lengths` (N,) in tokens.

    `cut` counts those that were longer than the tokenizer's limit. `targets` are what batches bring: first, the labels.
    """

    def __init__(self, tokenizer: Tokenizer, examples: Examples, rows: np.ndarray | None = None) -> None:
        examples = examples if rows is None else examples.take(rows)
        texts = [(text,) if isinstance(text, str) else text for text in examples.texts()]
        # Each sentence by itself: of a pair, the library keeps every piece of one that it cuts off with every other's.
        encodings = iter(tokenizer.encode_batch_fast(list(chain(*texts)), add_special_tokens=False))
        start, end, self.pad_id = map(tokenizer.token_to_id, (START, END, PAD))
        self.targets = self.labels = None if examples.labels is None else np.array(examples.labels, dtype=np.int64)
        self.ids, first_lengths, self.cut = [], [], 0
        for text in texts:
            sentences = list(islice(encodings, len(text)))
            room = tokenizer.truncation["max_length"] - tokenizer.num_special_tokens_to_add(len(text) == 2)
            lengths = [len(sentence) + sum(map(len, sentence.overflowing)) for sentence in sentences]  # uncut
            self.cut += sum(lengths) > room
            kept = longest_first(*lengths, room) if len(text) == 2 else [room]
            parts = [[*sentence.ids[:n], end] for sentence, n in zip(sentences, kept, strict=True)]
            self.ids.append(np.array([start, *chain(*parts)]))  # [CLS] A [SEP] B [SEP]
            first_lengths.append(1 + len(parts[0]))  # those of token type 0
        self.lengths, self.first_lengths = np.array(list(map(len, self.ids))), np.array(first_lengths)

    def __len__(self) -> int:
        return len(self.ids)

    def renumbered(self) -> tuple[np.ndarray, "TokenizedExamples"]:
        """The token ids that occur (V,), [PAD] among them, sorted, and the examples with their numbers there as ids."""
        used, numbers = np.unique(np.concatenate([*self.ids, [self.pad_id]]), return_inverse=True)
        examples = copy.copy(self)
        *examples.ids, _ = np.split(numbers, np.cumsum(self.lengths))
        examples.pad_id = int(numbers[-1])
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
        arrays = [rows, input_ids, mask.astype(np.int64), token_types.astype(np.int64)]
        arrays += [] if self.targets is None else [self.targets[rows]]
        return Batch(*map(torch.from_numpy, arrays))

    def shuffled(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One epoch of training: every example once, in random batches, each of similar length within POOL batches."""
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))
        pools = np.split(order, range(POOL * batch_size, len(order), POOL * batch_size))
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        for start in rng.permutation(np.arange(0, len(order), batch_size)):
            yield self.batch(order[start : start + batch_size])

    def by_length(self, batch_size: int, max_tokens: int = 2**31) -> Iterator[Batch]:
        """To evaluate: every example once, longest first, in batches of `batch_size`, or of `max_tokens` tokens."""
        order = np.argsort(-self.lengths, kind="stable")
        while len(order):
            size = min(batch_size, max(1, max_tokens // self.lengths[order[0]]))
            yield self.batch(order[:size])
            order = order[size:]
