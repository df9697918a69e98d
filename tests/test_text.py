"""Tokenising and batches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minisweet.base.files import InputError
from minisweet.data.rows import Examples
from minisweet.data.text import POOL, TokenizedExamples, load_tokenizer, special_ids
from tests.conftest import WORDS

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LONG = " ".join(WORDS * 4)


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
@settings(max_examples=200, deadline=None)
def test_texts_and_pairs_are_cut_as_the_library_cuts_them(tmp_path_factory, a, b, limit):
    tokenizer = load_tokenizer(write_wordpiece(tmp_path_factory.mktemp("t")), 26, limit)
    first, second = " ".join((WORDS * 4)[:a]), None if b is None else " ".join((WORDS * 4)[-b:][:b])
    theirs = tokenizer.encode(first, second)
    ours = TokenizedExamples(tokenizer, Examples([first], None if b is None else [second], None))
    batch = ours.batch(np.array([0]))
    assert (batch.input_ids[0].tolist(), batch.token_type_ids[0].tolist()) == (theirs.ids, theirs.type_ids)
    assert ours.cut == (len(theirs.overflowing) > 0)


def test_a_long_pair_fits_into_the_memory(tmp_path):
    tokenizer = load_tokenizer(write_wordpiece(tmp_path), 26, 8)
    examples = TokenizedExamples(tokenizer, Examples(["bad " * 30_000], ["good " * 30_000], None))
    assert (examples.lengths.tolist(), examples.cut) == ([8], 1)  # the library alone would want 70 GB for it


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


def test_wordpiece_vocabulary_lowercases_unless_told_otherwise(tmp_path):
    write_wordpiece(tmp_path)
    assert load_tokenizer(tmp_path, 26, 40).encode("The FILM.").tokens == ["[CLS]", "the", "film", ".", "[SEP]"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path, 26, 40).encode("The film").tokens == ["[CLS]", "[UNK]", "film", "[SEP]"]


TOO_SHORT, TOO_LONG = [*SPECIAL, *WORDS[:19]], [*SPECIAL, *WORDS, "a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("absent.txt", [], "missing or not readable"),
        ("tokenizer.json", ["{}"], "missing or not readable"),
        ("vocab.txt", ["[PAD]", "[UNK]", "a"], "missing or not readable .*sep_token"),
        ("vocab.txt", ["[CLS]", "[UNK]", "[SEP]", *WORDS], r"\[PAD\], \[UNK\] among them"),
        ("vocab.txt", TOO_LONG, "28 tokens, should have 26, as the embedding"),
        ("vocab.txt", TOO_SHORT, "23 tokens, should have 26, as the embedding"),
    ],
)
def test_unusable_tokenizers_are_refused_in_one_line(tmp_path, name, tokens, message):
    (tmp_path / name).write_text("\n".join(tokens))
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path, 26, 40)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(error.value)


def test_more_tokens_than_positions_are_refused(tmp_path):
    load_tokenizer(write_wordpiece(tmp_path), 26, 40, 40)
    with pytest.raises(InputError, match="--max-length: 41, should be at most 40"):
        load_tokenizer(tmp_path, 26, 41, 40)


@pytest.fixture
def tokenized(tmp_path):
    rng = np.random.default_rng(0)
    first = [" ".join(rng.choice(WORDS, size=rng.integers(0, 30))) for _ in range(101)]
    second = [" ".join(rng.choice(WORDS, size=rng.integers(0, 9))) for _ in range(101)]
    tokenizer = load_tokenizer(write_wordpiece(tmp_path), 26, 24)
    return tokenizer, TokenizedExamples(tokenizer, Examples(first, second, list(range(101)))), first, second


def test_a_batch_holds_its_rows_padded_to_the_longest(tokenized):
    tokenizer, examples, first, second = tokenized
    rows = np.array([5, 17, 3])
    batch = examples.batch(rows)
    assert batch.input_ids.shape == (3, examples.lengths[rows].max())
    assert batch.targets.tolist() == rows.tolist()
    for ids, mask, types, row in zip(*map(np.asarray, batch.inputs), rows, strict=True):
        encoding = tokenizer.encode(first[row], second[row])
        padding = [0] * (len(ids) - len(encoding.ids))
        assert ids.tolist() == encoding.ids + padding
        assert mask.tolist() == encoding.attention_mask + padding
        assert types.tolist() == encoding.type_ids + padding


def test_an_epoch_shows_every_example_once_and_depends_on_seed_and_epoch(tokenized):
    examples = tokenized[1]

    def epoch(seed, number):
        return [batch.rows.tolist() for batch in examples.shuffled(8, seed, number)]

    one = epoch(0, 0)
    assert sorted(sum(one, [])) == list(range(101))
    assert len(one) == 13
    assert one == epoch(0, 0) != epoch(0, 1) != epoch(1, 1)
    assert len(examples) < POOL * 8
    assert sum(batch.input_ids.numel() for batch in examples.shuffled(8, 0, 0)) < 1.15 * examples.lengths.sum()


def test_evaluation_shows_every_example_once_longest_first_in_limited_batches(tokenized):
    examples = tokenized[1]
    batches = list(examples.by_length(8, max_tokens=20))
    rows = sum((batch.rows.tolist() for batch in batches), [])
    assert sorted(rows) == sorted(sum((batch.rows.tolist() for batch in examples.by_length(8)), [])) == list(range(101))
    assert (np.diff(examples.lengths[rows]) <= 0).all()
    assert all(len(batch.rows) == 1 or batch.input_ids.numel() <= 20 for batch in batches)
    assert max(len(batch.rows) for batch in batches) <= 8


def test_renumbered_ids_name_the_same_tokens(tmp_path):
    tokenizer = load_tokenizer(write_wordpiece(tmp_path, [*WORDS, ".", *SPECIAL]), 26, 24)
    first = ["not bad", "the film.", "great"]
    examples = TokenizedExamples(tokenizer, Examples(first, None, [1, 0, 1]))
    used, renumbered = examples.renumbered()
    assert used.tolist() == sorted({examples.pad_id, *np.concatenate(examples.ids).tolist()})
    rows = np.array([2, 1, 0])
    batch, own = examples.batch(rows), renumbered.batch(rows)
    assert own.input_ids.unique().tolist() == list(range(len(used)))
    assert (used[own.input_ids] == batch.input_ids.numpy()).all()
    assert (own.attention_mask == batch.attention_mask).all()
    assert own.targets.tolist() == batch.targets.tolist() == [1, 0, 1]
    assert [tokenizer.decode(used[ids]) for ids in renumbered.ids] == first


def test_targets_may_be_probabilities_or_none(tokenized):
    examples = TokenizedExamples(tokenized[0], Examples(["not bad", "great"], None, None))
    assert examples.batch(np.array([1])).to("cpu").targets is None
    probabilities = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)
    batch = examples.with_targets(probabilities).renumbered()[1].batch(np.array([1, 0]))
    assert batch.targets.numpy().dtype == np.float32
    assert batch.targets.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert examples.targets is None
