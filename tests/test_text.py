"""Tokenising and batches."""

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
# Of 18 scripts and languages, with odd characters at the end.
TEXTS = """The CAFÉ was naïve, wasn't it? 100% “déjà-vu”!|Ein Straßenfest in ÜBERLINGEN, größer|L'ÉTÉ à Besançon; œuvre
¿Qué pasó mañana, señor NÚÑEZ?|Příliš žluťoučký kůň úpěl|Zażółć gęślą JAŹŃ|İstanbul'da ılık IĞDIR|Tiếng Việt có dấu
Съешь ещё этих булок, ЙОД|Ξεσκεπάζω ΒΔΕΛΥΓΜΊΑ|שָׁלוֹם עולם|مَرْحَبًا بالعالم|नमस्ते दुनिया|สวัสดีชาวโลก|我爱北京天安门,BERT也爱
東京タワーへ行きました。ガギグ|한국어 문장입니다|👍🏽 e\u0301 A\u030a \u200bzero\u00a0width\ttab\x07 ﬁ Ⅳ"""
TEXTS = TEXTS.replace("\n", "|").split("|")


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
    blanks = " " * (8 * CHARACTERS - 3)
    texts = [f"{blanks}bad good", "bad " * 30_000]
    pairs = Texts(tokenizer, Examples(texts[1:], texts[1:], None))  # all of it would take 70 GB
    assert (pairs.lengths.tolist(), pairs.is_cut.tolist()) == ([8], [True])
    assert [len(ids) for ids in Texts(tokenizer, Examples(texts, None, None)).ids] == [3, 8]


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


def test_byte_level_vocabulary_files_give_debertas_tokens(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path), 264, 40)
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


@pytest.fixture
def examples(tmp_path):
    rng = np.random.default_rng(0)
    first = [" ".join(rng.choice(WORDS, size=rng.integers(0, 30))) for _ in range(101)]
    second = [" ".join(rng.choice(WORDS, size=rng.integers(0, 9))) for _ in range(101)]
    rows = Examples(first, second, None)
    return Texts(load_tokenizer(write_wordpiece(tmp_path), 26, 24), rows)


def test_an_epoch_shows_every_example_once_and_depends_on_seed_and_epoch(examples):
    def epoch(seed, number):
        return [batch.rows.tolist() for batch in examples.shuffled(8, seed, number)]

    one = epoch(0, 0)
    assert sorted(sum(one, [])) == list(range(101))
    assert len(one) == 13
    assert one == epoch(0, 0) != epoch(0, 1) != epoch(1, 1)
    assert len(examples) < POOL * 8
    assert sum(batch.input_ids.numel() for batch in examples.shuffled(8, 0, 0)) < 1.15 * examples.lengths.sum()


def test_evaluation_shows_every_example_once_longest_first_in_limited_batches(examples):
    batches = list(examples.by_length(8, max_tokens=20))
    rows = sum((batch.rows.tolist() for batch in batches), [])
    assert sorted(rows) == sorted(sum((batch.rows.tolist() for batch in examples.by_length(8)), [])) == list(range(101))
    assert (np.diff(examples.lengths[rows]) <= 0).all()
    assert all(len(batch.rows) == 1 or batch.input_ids.numel() <= 20 for batch in batches)
    assert max(len(batch.rows) for batch in batches) <= 8


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
