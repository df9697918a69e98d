"""Tokenizing and batches."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minisweet.loading import read_config
from minisweet.texts import CHARACTERS, POOL, Examples, Texts, load_tokenizer, special_ids
from tests.conftest import WORDS, refused, write_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LONG = " ".join(WORDS * 4)
# Of several scripts, with odd characters at the end.
TEXTS = """The CAFÉ wasn't “déjà-vu”!|İstanbul'da ılık IĞDIR|Ξεσκεπάζω ЙОД|שָׁלוֹם مَرْحَبًا|नमस्ते สวัสดี|我爱北京,BERT也爱
東京タワーへガギグ|한국어 문장|👍🏽 e\u0301 A\u030a \u200bzero\u00a0width\ttab\x07 ﬁ Ⅳ""".replace("\n", "|").split("|")


def write_wordpiece(folder, vocabulary=None):
    (folder / "vocab.txt").write_text("\n".join(vocabulary or [*SPECIAL, *WORDS, "."]))
    return folder


def write_tokenizer_json(folder):
    """A file with truncation, padding and a doubled [SEP] of its own, none of which must count."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_token="[PAD]")
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_byte_level(folder):
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *pre_tokenizers.ByteLevel.alphabet(), "Ġb", "ad", "bad", "Ġbad"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na d\nb ad\nĠ bad\n")
    return folder


@given(a=st.integers(0, 60), b=st.none() | st.integers(0, 60), limit=st.integers(8, 24))
@settings(max_examples=30)
def test_texts_and_pairs_are_cut_by_the_library_and_padded_to_the_longest(tmp_path_factory, a, b, limit):
    tokenizer = load_tokenizer(write_wordpiece(tmp_path_factory.mktemp("t")), 26, limit)
    first, second = " ".join((WORDS * 4)[:a]), None if b is None else " ".join((WORDS * 4)[-b:][:b])
    theirs = tokenizer.encode(first, second)
    ours = Texts(tokenizer, Examples([LONG, first], None if b is None else [LONG, second], None))
    padding = [0] * (limit - len(theirs.ids))
    padded = [values + padding for values in (theirs.ids, theirs.attention_mask, theirs.type_ids)]
    assert [values[0].tolist() for values in ours.batch(np.array([1, 0])).inputs] == padded
    assert ours.is_cut.tolist() == [True, len(theirs.overflowing) > 0]


def test_of_a_long_text_so_many_characters_per_token_are_read(tmp_path):
    tokenizer = load_tokenizer(write_wordpiece(tmp_path), 26, 8)
    texts = [" " * (8 * CHARACTERS - 3) + "bad good", "bad " * 30_000]
    single = Texts(tokenizer, Examples(texts, None, None))
    assert (single.lengths.tolist(), single.is_cut.tolist()) == ([3, 8], [True, True])
    pairs = Texts(tokenizer, Examples(texts[1:], texts[1:], None))  # all of it would take 70 GB
    assert (pairs.lengths.tolist(), pairs.is_cut.tolist()) == ([8], [True])


@pytest.mark.parametrize("write", [write_wordpiece, write_tokenizer_json, write_byte_level])
def test_our_settings_alone_count(tmp_path, write):
    tokenizer = load_tokenizer(write(tmp_path), 264 if write is write_byte_level else 26, 40)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    pair = tokenizer.encode("the film", "not bad")
    assert (pair.ids[0], pair.ids[-1], pair.ids.count(sep)) == (cls, sep, 2)  # [CLS] A [SEP] B [SEP]
    first = pair.ids.index(sep) + 1
    assert pair.type_ids == [0] * first + [1] * (len(pair.ids) - first)
    assert len(tokenizer.encode(LONG, LONG).ids) == 40
    assert len(tokenizer.encode("bad").ids) < 8  # not padded
    assert special_ids(tokenizer) == [cls, sep, *map(tokenizer.token_to_id, ("[PAD]", "[UNK]"))]
    if write is write_byte_level:  # DeBERTa's tokens
        assert tokenizer.encode("bad bad").tokens == ["[CLS]", "bad", "Ġbad", "[SEP]"]
        assert tokenizer.decode(tokenizer.encode("Bad é ü").ids) == "Bad é ü"


@pytest.mark.parametrize("name", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
@pytest.mark.parametrize("value", ["true", "false", None])
def test_wordpiece_tokens_are_those_of_transformers(tmp_path, name, value):
    transformers = pytest.importorskip("transformers", reason="transformers, whose tokens ours are compared with")
    letters = sorted({letter for text in TEXTS for letter in text + text.lower() + unicodedata.normalize("NFD", text)})
    pieces = [piece for letter in letters if letter.strip() for piece in (letter, f"##{letter}")]
    write_wordpiece(tmp_path, [*SPECIAL, "[MASK]", *pieces])
    if value:
        (tmp_path / "tokenizer_config.json").write_text(f'{{"{name}": {value}}}')
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, len(pieces) + 5, 200)
    assert [ours.encode(text).ids for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("absent.txt", [], "missing or not readable"),
        ("tokenizer.json", ["{"], "missing or not readable"),
        ("tokenizer.json", [Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")).to_str()], "Missing "),
        ("tokenizer_config.json", ['{"do_lower_case": "no"}'], "its tokenizer is missing or not readable ("),
        ("vocab.txt", ["[CLS]", "[UNK]", "[SEP]", *WORDS], "or slightly fewer, with [CLS], [SEP], [PAD], [UNK]"),
        ("vocab.txt", [*SPECIAL, *WORDS, "a", "b", "c"], "28 tokens, should have 26 (the rows of the embedding)"),
    ],
)
def test_unusable_tokenizers_are_refused_in_one_line(tmp_path, name, tokens, message):
    (tmp_path / name).write_text("\n".join(tokens))
    error = refused(load_tokenizer, tmp_path, 26, 40)
    assert (error.startswith(f"{tmp_path}: "), message in error) == (True, True)


def test_batches_show_every_example_once_with_little_padding(tmp_path):
    """Of an epoch in an order by seed and epoch; of an evaluation the longest first, in limited batches."""
    rng = np.random.default_rng(0)
    sides = [[" ".join(rng.choice(WORDS, size=rng.integers(0, most))) for _ in range(101)] for most in (30, 9)]
    examples = Texts(load_tokenizer(write_wordpiece(tmp_path), 26, 24), Examples(*sides, None))
    epochs = [[*examples.shuffled(8, *which)] for which in ((0, 0), (0, 0), (0, 1), (1, 1))]
    evaluations = [[*examples.by_length(8)], [*examples.by_length(8, max_tokens=20)]]
    orders = [[row for batch in batches for row in batch.rows.tolist()] for batches in epochs + evaluations]
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert (len(epochs[0]), max(len(batch.rows) for batch in sum(evaluations, []))) == (13, 8)
    assert orders[0] == orders[1] != orders[2] != orders[3]
    assert len(examples) < POOL * 8
    assert sum(batch.input_ids.numel() for batch in epochs[0]) < 1.15 * examples.lengths.sum()
    assert (np.diff(examples.lengths[orders[5]]) <= 0).all()
    assert all(len(batch.rows) == 1 or batch.input_ids.numel() <= 20 for batch in evaluations[1])


def test_mpnets_tokens_and_positions(tmp_path):
    """As in transformers; 42 positions hold 40 tokens."""
    folder = write_model(tmp_path, "mpnet")
    config = read_config(folder)
    assert "max_length: 41, should be at most 40" in refused(load_tokenizer, folder, 60, 41, config.max_tokens)
    tokenizer = load_tokenizer(folder, config.vocab_size, 40, config.max_tokens)
    assert [tokenizer.id_to_token(n) for n in special_ids(tokenizer)] == ["<s>", "</s>", "<pad>", "[UNK]"]
    pair = tokenizer.encode("the film", "not good")
    assert pair.tokens == ["<s>", "the", "film", "</s>", "</s>", "not", "good", "</s>"]
    examples = Texts(tokenizer, Examples(["the film"], ["not good"], None))
    assert examples.ids[0].tolist() == pair.ids
    assert examples.batch(np.array([0])).token_type_ids[0].tolist() == pair.type_ids == [0] * 5 + [1] * 3
