"""Sentences to batches (B) of tokens (T): N examples are tokenized once, and each batch is padded to its longest."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer, processors
from torch import Tensor

from minisweet.base.files import InputError, preview, read_json, regular_file

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
# Start, end, padding and unknown word. MPNet's vocabulary holds BERT's too, and its pairs are <s> A </s></s> B </s>.
BERTS, MPNETS = ("[CLS]", "[SEP]", "[PAD]", "[UNK]"), ("<s>", "</s>", "<pad>", "[UNK]")
SPECIAL = [MPNETS, BERTS]  # a tokenizer's are the first of these that it has
# The settings of tokenizer_config.json for splitting a text into words of vocab.txt, and their names in `tokenizers`.
WORD_PIECE = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
WORD_PIECE |= {"tokenize_chinese_chars": "handle_chinese_chars"}
CHARACTERS = 32  # read per token, several times what is needed; the rest of a text is ignored
CHUNK = 256  # texts per call of the tokenizer; few, because the library keeps what it truncates in memory
POOL = 50  # batches per pool: to pad little, examples are sorted by length within a pool; then batches are shuffled


class Examples(NamedTuple):
    """N rows of text. Each list has N items."""

    first: list[str]
    second: list[str] | None  # None for single sentences
    labels: list[int] | None  # class indices, -1 for a row without a label; None if no row has one
    names: list[str | None] | None = None  # labels as they are written; this and `groups` are for classifier/ alone
    groups: list[str | None] | None = None  # what a row belongs to, such as a thread; None for a row by itself
    empty: int = 0  # how many rows without text were skipped

    @classmethod
    def of(cls, rows: list[list[str]], labels: list[int] | None = None, empty: int = 0) -> "Examples":
        """Rows of one text or two."""
        first, *second = [list(side) for side in zip(*rows, strict=True)]
        return cls(first, second[0] if second else None, labels, empty=empty)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Some of the rows."""
        lists = {name: values for name, values in self._asdict().items() if name != "empty" and values is not None}
        return self._replace(**{name: [values[row] for row in rows] for name, values in lists.items()}, empty=0)

    def digest(self) -> str:
        """A SHA-256 of the texts and the class indices, in their order."""
        return hashlib.sha256(json.dumps([self.first, self.second, self.labels]).encode()).hexdigest()


def read_lines(path: Path) -> Iterator[list[str]]:
    """Yield the cells of each line of a tab-separated file. Raises InputError if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # a carriage return may stand in a text
            for line in file:
                yield line.rstrip("\r\n").split("\t")  # cells have no quotes
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_cells(
    path: Path, columns: Sequence[str], header: Sequence[str] = (), may_be_short: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line after the header, and its cells in some columns. Those of a blank line are empty.

    `header` names all columns if the file has no header line (GLUE's new texts of CoLA have one). Raises InputError for
    an unreadable file, a missing column, or a line with too many or too few cells; if `may_be_short`, too few yield [].
    """
    lines, start = read_lines(path), 2
    first = list(islice(lines, 1))
    if header and not (first and {*columns} <= {*first[0]}):  # a first line that holds the columns' names is a header
        lines, first, start = chain(first, lines), [list(header)], 1
    header = first[0] if first else []
    if lacking := [column for column in columns if column not in header]:
        raise InputError(f"{path}: no column {', '.join(lacking)}; its header names {preview(header)}")
    places = [header.index(column) for column in columns]
    for number, cells in enumerate(lines, start):
        cells = [""] * len(header) if cells == [""] else cells
        is_short = len(cells) <= max(places)
        if len(cells) > len(header) or (is_short and not may_be_short):
            raise InputError(f"{path}, line {number}: {len(cells)} cells, should be {len(header)}: {preview(header)}")
        yield number, [] if is_short else [cells[place] for place in places]


def load_tokenizer(folder: Path, vocab_size: int, max_length: int, max_tokens: int = 2**31) -> Tokenizer:
    """Load a tokenizer that truncates to `max_length` tokens, including [CLS] and [SEP], and does not pad.

    `folder` holds tokenizer.json, or else vocab.json and merges.txt (byte-level BPE) or vocab.txt (WordPiece). Raises
    InputError if the vocabulary does not fit the embedding's `vocab_size` rows, or `max_length` exceeds `max_tokens`.
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
            own = read_json(settings) if settings.exists() else {}
            kinds = {own.get("word_tokenizer_type"), own.get("subword_tokenizer_type")}
            if not kinds <= {None, "basic", "wordpiece"}:
                raise ValueError(f"{kinds}, as for Japanese, is not implemented")
            options = {ours: own[public] for public, ours in WORD_PIECE.items() if public in own}
            tokenizer = BertWordPieceTokenizer.from_file(str(regular_file(words)), **options)
        tokenizer.encode("\U00013000")  # an unknown word: raises if its token is missing
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"{folder}: its tokenizer is missing or not readable ({error})") from None
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    ids = tokenizer.get_vocab()
    size = 1 + max(ids.values(), default=0)
    special = special_tokens(tokenizer)
    if not ids.keys() >= set(special) or not 0.9 * vocab_size <= size <= vocab_size:  # a tenth less is usual
        right = f"{vocab_size} (the rows of the embedding) or slightly fewer, with {', '.join(special)}"
        raise InputError(f"{folder}: its tokenizer has {size} tokens, should have {right}")
    tokenizer.add_special_tokens(list(special))
    start, end, *_ = special
    one = [f"{start}:0", "$A:0", f"{end}:0"]
    between = [f"{end}:0"] if special != BERTS else []
    known = [(token, ids[token]) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(one, [*one, *between, "$B:1", f"{end}:1"], known)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def special_tokens(tokenizer: Tokenizer) -> tuple[str, str, str, str]:
    """A tokenizer's tokens for start, end, padding and unknown words."""
    return next((some for some in SPECIAL if None not in map(tokenizer.token_to_id, some)), BERTS)


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of `special_tokens`, all of which a tokenizer of `load_tokenizer` has."""
    return [cast(int, tokenizer.token_to_id(token)) for token in special_tokens(tokenizer)]


class Batch(NamedTuple):
    """Some examples, padded to the longest of them. All tensors are int64."""

    rows: Tensor  # (B,) which examples
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T): 1 for tokens, 0 for padding
    token_type_ids: Tensor  # (B, T): 1 in the second sentence
    labels: Tensor  # (B,), -1 without one

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of a model: input_ids, attention_mask, token_type_ids."""
        return self.input_ids, self.attention_mask, self.token_type_ids

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(tensor.to(device) for tensor in self))


class Texts:
    """N examples, tokenized once.

    Attributes:
        examples: the strings and labels.
        ids: a list of N arrays of token ids, each with [CLS] and [SEP].
        lengths: (N,), how many tokens each has.
        is_cut: (N,), whether a text had more tokens than the tokenizer's limit, or more than 32 characters per token.
        keys: (N,), 64-bit hashes of the ids. Two texts have equal keys if they only differ in what the tokenizer drops,
            such as upper case, or the end of a long text. Their order is as good as random.
        labels: (N,), the classes, -1 for a row without a label.
    """

    def __init__(self, tokenizer: Tokenizer, examples: Examples) -> None:
        self.examples, self.pad_id = examples, special_ids(tokenizer)[2]
        self.labels = np.array(examples.labels or [-1] * len(examples.first), dtype=np.int64)
        self.ids, first_lengths, is_cut, digests = [], [], [], []
        assert tokenizer.truncation is not None  # `load_tokenizer` has set it
        most = CHARACTERS * tokenizer.truncation["max_length"]
        sides = [side for side in (examples.first, examples.second) if side is not None]
        for start in range(0, len(examples.first), CHUNK):
            rows = list(zip(*(side[start : start + CHUNK] for side in sides), strict=True))
            read = [tuple(text[:most] for text in row) for row in rows]
            encodings = tokenizer.encode_batch_fast(read if len(sides) > 1 else [text for (text,) in read])
            for row, encoding in zip(rows, encodings, strict=True):
                self.ids.append(np.array(encoding.ids))  # [CLS] A [SEP] B [SEP]
                first_lengths.append(encoding.type_ids.count(0))
                is_cut.append(len(encoding.overflowing) > 0 or max(map(len, row)) > most)
                digests.append(hashlib.sha256(self.ids[-1].astype("<i8").tobytes()).digest()[:8])
        self.lengths = np.array([len(ids) for ids in self.ids], dtype=int)
        self.first_lengths = np.array(first_lengths, dtype=int)
        self.is_cut = np.array(is_cut, dtype=bool)
        self.keys = np.frombuffer(b"".join(digests), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Texts":
        """Some of the rows."""
        taken = copy.copy(self)
        rows = np.asarray(rows, dtype=int)
        taken.examples, taken.ids = self.examples.take(rows), [self.ids[row] for row in rows]
        for name in ("lengths", "first_lengths", "is_cut", "keys", "labels"):
            setattr(taken, name, getattr(self, name)[rows])
        return taken

    def batch(self, rows: np.ndarray) -> Batch:
        """The examples `rows` (B,), padded to the longest of them."""
        positions = np.arange(self.lengths[rows].max())  # (T,)
        mask = positions < self.lengths[rows, None]  # (B, T)
        input_ids = np.full(mask.shape, self.pad_id)
        input_ids[mask] = np.concatenate([self.ids[row] for row in rows])
        token_types = mask & (positions >= self.first_lengths[rows, None])
        arrays = rows, input_ids, mask.astype(np.int64), token_types.astype(np.int64), self.labels[rows]
        return Batch(*map(torch.from_numpy, arrays))

    def shuffled(self, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        """One training epoch: every example once, in shuffled batches of similar length (sorted in pools)."""
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))
        pools = np.split(order, range(POOL * batch_size, len(order), POOL * batch_size))
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        for start in rng.permutation(np.arange(0, len(order), batch_size)):
            yield self.batch(order[start : start + batch_size])

    def by_length(self, batch_size: int, max_tokens: int = 2**31) -> Iterator[Batch]:
        """For inference: every example once, the longest first, in batches of at most `batch_size` and `max_tokens`."""
        order = np.argsort(-self.lengths, kind="stable")
        while len(order):
            size = min(batch_size, max(1, max_tokens // self.lengths[order[0]]))
            yield self.batch(order[:size])
            order = order[size:]
