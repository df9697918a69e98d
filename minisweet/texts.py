"""Sentences into batches (B) of tokens (T): N examples are tokenised once, and padded to the longest of a batch."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer, processors
from torch import Tensor

from minisweet.base.files import InputError, read_dataclass, regular_file

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
# The tokens that are no words: what begins a text, ends it, pads it, and stands for unknown words. MPNet has its end
# twice between two texts, <s> A </s></s> B </s>. Its vocabulary holds BERT's tokens too.
BERTS, MPNETS = ("[CLS]", "[SEP]", "[PAD]", "[UNK]"), ("<s>", "</s>", "<pad>", "[UNK]")
CHARACTERS = 32  # per token: so many of a text are read, several times what its tokens have
CHUNK = 256  # texts that are tokenised at once, since the library also keeps what it cuts off
ARRAYS = ("lengths", "first_lengths", "is_cut", "keys", "units")  # of `Texts`, (N,) each
POOL = 50  # batches: examples are sorted by length within so many, for little padding, then the batches are shuffled


class Examples(NamedTuple):
    """N rows: each list has N."""

    first: list[str]
    second: list[str] | None  # None where there are single sentences
    labels: list[int] | None  # indices of classes, -1 for a row without a label; None where no row has one
    difficulties: list[str] | None = None  # of the toy task only
    groups: list[str | None] | None = None  # what a row belongs to, such as a thread; None for a row by itself
    empty: int = 0  # rows without text, which were skipped

    def take(self, rows: Sequence[int]) -> "Examples":
        """These rows alone."""
        return Examples(*(None if values is None else [values[row] for row in rows] for values in self[:-1]))

    def joined(self, *others: "Examples") -> "Examples":
        """These rows and others, all with labels: -1 where there is none."""
        its = (self, *others)
        second = None if self.second is None else sum((rows.second for rows in its), [])
        labels = sum((rows.labels or [-1] * len(rows.first) for rows in its), [])
        groups = sum((rows.groups or [None] * len(rows.first) for rows in its), [])
        first, empty = sum((rows.first for rows in its), []), sum(rows.empty for rows in its)
        return Examples(first, second, labels, groups=groups if any(groups) else None, empty=empty)

    def texts(self) -> list:
        """Each row's sentence, or pair of sentences."""
        return self.first if self.second is None else list(zip(self.first, self.second, strict=True))

    def digest(self) -> str:
        """The SHA-256 of the texts and labels, in hexadecimal."""
        rows = zip(self.texts(), self.labels or [None] * len(self.first), strict=True)
        return hashlib.sha256(b"".join(json.dumps(row).encode() + b"\n" for row in rows)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class WordPiece:
    """The keys of tokenizer_config.json that say how the words for vocab.txt are made."""

    do_lower_case: bool = True
    strip_accents: bool | None = None  # None: where letters are made lower case
    tokenize_chinese_chars: bool = True  # each is a word
    word_tokenizer_type: Literal["basic", None] = None  # else what makes words is not BERT's, as in Japanese
    subword_tokenizer_type: Literal["wordpiece", None] = None


def load_tokenizer(folder: Path, vocab_size: int, max_length: int, max_tokens: int = 2**31) -> Tokenizer:
    """Load a tokenizer that truncates to `max_length` tokens, [CLS] and [SEP] among them, and does not pad.

    `folder` holds tokenizer.json, or else vocab.json and merges.txt (byte-level BPE) or vocab.txt (WordPiece). Raises
    InputError for one that does not fit the embedding's `vocab_size` rows, and for a length above `max_tokens`.
    """
    if max_length > max_tokens:
        raise InputError(f"{max_length}, should be at most {max_tokens}, the positions of {folder}", "max_length")
    whole, words, pieces, merges, settings = (folder / name for name in TOKENIZER_FILES)
    try:
        if whole.exists():
            tokenizer = Tokenizer.from_file(str(regular_file(whole)))
        elif pieces.exists():
            tokenizer = ByteLevelBPETokenizer.from_file(str(regular_file(pieces)), str(regular_file(merges)))
        else:
            own = read_dataclass(WordPiece, settings) if settings.exists() else WordPiece()
            options = {"strip_accents": own.strip_accents, "handle_chinese_chars": own.tokenize_chinese_chars}
            options["lowercase"] = own.do_lower_case
            tokenizer = BertWordPieceTokenizer.from_file(str(regular_file(words)), **options)
        tokenizer.encode("\U00013000")  # an unknown word: raises where the token for it is missing
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing more special, and its panics are no Exception
        raise InputError(f"{folder}: its tokenizer is missing or not readable ({error})") from None
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    ids = tokenizer.get_vocab()
    size = 1 + max(ids.values(), default=0)
    special = special_tokens(tokenizer)
    if not ids.keys() >= set(special) or not 0.9 * vocab_size <= size <= vocab_size:  # a tenth less is usual
        right = f"{vocab_size}, as the embedding has rows, and {', '.join(special)} among them"
        raise InputError(f"{folder}: its tokenizer has {size} tokens, should have {right}")
    tokenizer.add_special_tokens(list(special))
    start, end, *_ = special
    one, between = [f"{start}:0", "$A:0", f"{end}:0"], [f"{end}:0"] if special == MPNETS else []
    known = [(token, ids[token]) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(one, [*one, *between, "$B:1", f"{end}:1"], known)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> tuple[str, str, str, str]:
    """A tokenizer's start, end, padding and unknown word."""
    return BERTS if None in map(tokenizer.token_to_id, MPNETS) else MPNETS  # get_vocab() would take 10 ms


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of `special_tokens`."""
    return list(map(tokenizer.token_to_id, special_tokens(tokenizer)))


class Batch(NamedTuple):
    """Some examples, padded to the longest of them; all tensors but probabilities are int64."""

    rows: Tensor  # (B,) which examples
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T): 1 for tokens, 0 for padding
    token_type_ids: Tensor  # (B, T): 1 in the second sentence
    targets: Tensor | None = None  # (B,) labels, or (B, C) probabilities in float32, each row multiplied by its weight

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a model reads: input_ids, attention_mask, token_type_ids."""
        return self.input_ids, self.attention_mask, self.token_type_ids

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(tensor.to(device) for tensor in self if tensor is not None))


class Texts:
    """N examples, tokenised once: strings and labels, token ids, and what one text is told from another by.

    `examples` has the strings and labels, `ids` a list of each row's tokens, `lengths` (N,) their number, and `is_cut`
    (N,) says whether there were more than the tokenizer's limit. `targets` are what training learns: labels (N,),
    probabilities (N, C), or None.

    `keys` (N,) are 64-bit hashes of the ids, in an order as good as random. So texts that differ in nothing but what
    the tokenizer drops, such as a long text's end, or BERT's case, have one key. `units` (N,) are keys too: rows of one
    unit are of one text, or of one group (`unite`).
    """

    def __init__(self, tokenizer: Tokenizer, examples: Examples) -> None:
        self.examples, self.pad_id = examples, special_ids(tokenizer)[2]
        self.targets = None if examples.labels is None else np.array(examples.labels, dtype=np.int64)
        self.ids, first_lengths, is_cut, digests = [], [], [], []
        most = CHARACTERS * tokenizer.truncation["max_length"]
        sides = [side for side in (examples.first, examples.second) if side is not None]
        for start in range(0, len(examples.first), CHUNK):
            some = [[text[:most] for text in side[start : start + CHUNK]] for side in sides]
            for encoding in tokenizer.encode_batch_fast(list(zip(*some, strict=True)) if len(some) > 1 else some[0]):
                self.ids.append(np.array(encoding.ids))  # [CLS] A [SEP] B [SEP]
                first_lengths.append(encoding.type_ids.count(0))
                is_cut.append(len(encoding.overflowing) > 0)
                digests.append(hashlib.sha256(self.ids[-1].astype("<i8")).digest()[:8])
        self.lengths, self.first_lengths = (
            np.array([*map(len, self.ids)], dtype=int),
            np.array(first_lengths, dtype=int),
        )
        self.is_cut, self.keys = np.array(is_cut, dtype=bool), np.frombuffer(b"".join(digests), dtype=np.int64)
        self.units = self.keys
        if examples.groups:
            unite(self)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        """The classes (N,), -1 where a row has no label."""
        return np.array(self.examples.labels or [-1] * len(self), dtype=np.int64)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Texts":
        """These rows alone."""
        some, rows = copy.copy(self), np.asarray(rows, dtype=int)
        some.examples, some.ids = self.examples.take(rows), [self.ids[row] for row in rows]
        some.targets = None if self.targets is None else self.targets[rows]
        for name in ARRAYS:
            setattr(some, name, getattr(self, name)[rows])
        return some

    def joined(self, others: "Texts") -> "Texts":
        """These and others, without targets."""
        both = copy.copy(self)
        both.examples, both.ids = self.examples.joined(others.examples), self.ids + others.ids
        both.targets = None
        for name in ARRAYS:
            setattr(both, name, np.concatenate([getattr(self, name), getattr(others, name)]))
        return both

    def with_targets(self, targets: np.ndarray) -> "Texts":
        """The same with other targets, (N,) or (N, C)."""
        same = copy.copy(self)
        same.targets = targets
        return same

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


def unite(*parts: Texts) -> None:
    """Set the units of texts. A row's unit is the lowest key among the rows that it hangs together with.

    Rows of one key hang together, and so do rows of one group, in all parts.
    """
    keys = np.concatenate([part.keys for part in parts])
    names = [name for part in parts for name in part.examples.groups or [None] * len(part)]
    units, named = keys.copy(), np.array([name is not None for name in names], dtype=bool)
    links = [(np.arange(len(keys)), np.unique(keys, return_inverse=True)[1])]
    links += [(np.flatnonzero(named), np.unique([name for name in names if name is not None], return_inverse=True)[1])]
    before = None
    while not np.array_equal(units, before):  # a chain of links takes several rounds
        before = units.copy()
        for rows, which in links:
            lowest = np.full(1 + which.max(initial=-1), np.iinfo(np.int64).max)
            np.minimum.at(lowest, which, units[rows])
            units[rows] = lowest[which]
    for part, its in zip(parts, np.split(units, np.cumsum([len(part) for part in parts])[:-1]), strict=True):
        part.units = its


def hashes(units: np.ndarray, purpose: str) -> np.ndarray:
    """A hash of each unit (N,), by which it is dealt out: as good as random, for each purpose anew, always the same."""
    distinct, place = np.unique(units, return_inverse=True)
    digests = [hashlib.sha256(purpose.encode() + unit.tobytes()).digest()[:8] for unit in distinct]
    return np.frombuffer(bytearray().join(digests), dtype=np.uint64)[place]


def dealt(units: np.ndarray, count: int, purpose: str) -> np.ndarray:
    """Which rows (N,) are of the `count` units whose hash is smallest."""
    hashed = hashes(units, purpose)
    return np.isin(hashed, np.unique(hashed)[:count])


def one_of_each(units: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which rows (N,) are of the text that is drawn of their unit: that with the smallest hash."""
    _, place = np.unique(units, return_inverse=True)
    hashed, smallest = (
        hashes(keys, "one of each"),
        np.full(1 + place.max(initial=-1), np.iinfo(np.uint64).max, np.uint64),
    )
    np.minimum.at(smallest, place, hashed)
    return hashed == smallest[place]


class Data(NamedTuple):
    """What a training learns from, and validates on: rows of a task and own text are the same from here on."""

    task: str  # or the name of own text's file
    labels: list[str]  # (C,), what classes are called
    train: Texts
    validation: Texts
    subset: list[int]  # which of the labelled rows `train` holds
    rows: int  # how many of them there are
    empty: int  # rows without text, which were skipped
    unlabelled: Texts | None = None  # texts without labels, to learn from
    metric: str = "accuracy"
    text_columns: list[str] | None = None  # all from here on are own text's
    label_column: str | None = None
    group_column: str | None = None
    label_type: str = "str"
    set_aside: float = 1.0  # the share of the labelled rows that validates; 1 where these rows have their own file
