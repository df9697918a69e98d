"""Tokenising and batches."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minisweet.base.safe import InputError
from minisweet.data.rows import Examples
from minisweet.data.text import POOL, TokenizedExamples, load_tokenizer
from tests.conftest import CHECKOUT, WORDS

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
    text = " ".join((WORDS * 4)[:a]) if b is None else (" ".join((WORDS * 4)[:a]), " ".join((WORDS * 4)[-b:][:b]))
    theirs, ours = tokenizer.encode_batch([text])[0], TokenizedExamples(tokenizer, Examples([text], None, None))
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
    assert pair.ids[0] == cls
    assert pair.ids.count(sep) == 2  # [CLS] A [SEP] B [SEP]
    assert pair.ids[-1] == sep
    first = pair.ids.index(sep) + 1
    assert pair.type_ids == [0] * first + [1] * (len(pair.ids) - first)
    assert len(tokenizer.encode(LONG, LONG).ids) == 40  # a long pair reaches the limit
    assert len(tokenizer.encode("bad").ids) < 8  # a short one is not padded
    assert tokenizer.encode(LONG, "bad").ids[-1] == sep  # the longer sentence is cut, the other stays whole
    assert tokenizer.encode(LONG, "bad").type_ids.count(1) == len(tokenizer.encode("bad").ids) - 1


def test_byte_level_vocabulary_files_give_debertas_tokens(tmp_path):
    tokenizer = load_tokenizer(write_byte_level(tmp_path), 264, 40)
    assert tokenizer.encode("bad bad").tokens == ["[CLS]", "bad", "Ġbad", "[SEP]"]
    assert tokenizer.decode(tokenizer.encode("Bad é ü").ids) == "Bad é ü"


def test_wordpiece_vocabulary_lowercases_unless_told_otherwise(tmp_path):
    write_wordpiece(tmp_path)
    assert load_tokenizer(tmp_path, 26, 40).encode("The FILM.").tokens == ["[CLS]", "the", "film", ".", "[SEP]"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path, 26, 40).encode("The film").tokens == ["[CLS]", "[UNK]", "film", "[SEP]"]


def changed(folder, change):
    """Change the settings in a tokenizer.json."""
    path = write_tokenizer_json(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def precompiled(content):
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}


def fixed_length(content):
    content["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, r"no tokenizer\.json, vocab\.txt, or vocab\.json"),
        (lambda folder: write_wordpiece(folder, ["[PAD]", "[UNK]", "a"]), "sep_token not found"),
        (
            lambda folder: write_wordpiece(folder, [*SPECIAL, *WORDS, "a", "b", "c"]),
            "token 27, and the embedding only 26",
        ),
        (lambda folder: write_wordpiece(folder, [*SPECIAL, *WORDS[:19]]), "23 tokens for an embedding of 26 rows"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not usable"),
        (lambda folder: changed(folder, lambda content: content["model"].update(unk_token="<none>")), "not usable"),
        (lambda folder: changed(folder, lambda content: content["model"].update(vocab={})), r"has no \[CLS\]"),
        (lambda folder: changed(folder, precompiled), "not usable .*index out of bounds"),
        (lambda folder: changed(folder, fixed_length), "not usable .*chunk size must be non-zero"),
    ],
    ids=["none", "special", "too many", "too few", "not one", "unknown", "empty", "panic", "another panic"],
)
def test_unusable_tokenizers_are_refused_in_one_line(tmp_path, capfd, write, message):
    write(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(tmp_path, 26, 40)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(error.value)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n", "a panic should not print, and what comes after it should"


def test_standard_error_is_left_alone_while_tokenizers_are_read(tmp_path, monkeypatch):
    """Of a process whose threads write there, and where descriptors 0 and 2 are closed, as a daemon's may be."""
    folder = write_wordpiece(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup2", lambda *_: pytest.fail("a descriptor of the whole process was led elsewhere"))
        assert load_tokenizer(folder, 26, 40).encode("bad").tokens == ["[CLS]", "bad", "[SEP]"]
    code = f"""
import os, sys
from pathlib import Path
from minisweet.data.text import load_tokenizer
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: load_tokenizer(Path({str(folder)!r}), 26, 40), range(40)))
os.write(2, b"still here")
os.close(0), os.close(2)
print(load_tokenizer(Path({str(folder)!r}), 26, 40).encode("bad").tokens)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.stdout, done.stderr) == ("['[CLS]', 'bad', '[SEP]']\n", "still here")


@pytest.mark.parametrize("max_length", [-1, 7, 41, 2**64, True, 16.0, "16", None])
def test_a_length_outside_its_range_is_refused(tmp_path, max_length):
    with pytest.raises(InputError, match=r"max_length is .*, should be from 8 to 40 tokens"):
        load_tokenizer(write_wordpiece(tmp_path), 26, max_length, 40)
    load_tokenizer(tmp_path, 26, 40, 40)


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
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.token_type_ids.shape
    assert batch.input_ids.shape == (3, examples.lengths[rows].max())
    for ids, mask, types, label, row in zip(*batch.inputs, batch.targets, rows, strict=True):
        encoding = tokenizer.encode(first[row], second[row])
        n = len(encoding.ids)
        assert ids.tolist() == encoding.ids + [0] * (len(ids) - n)
        assert mask.tolist() == [1] * n + [0] * (len(ids) - n)
        assert types[:n].tolist() == encoding.type_ids
        assert types[n:].sum() == 0
        assert label == row


def test_an_epoch_shows_every_example_once_and_depends_on_seed_and_epoch(tokenized):
    examples = tokenized[1]

    def epoch(seed, number):
        return [batch.rows.tolist() for batch in examples.shuffled(8, seed, number)]

    one = epoch(0, 0)
    assert sorted(sum(one, [])) == list(range(101))
    assert len(one) == 13
    assert one == epoch(0, 0) != epoch(0, 1) != epoch(1, 1)
    assert [batch.rows.tolist() for batch in examples.by_length(8)][0] != one[0]
    assert sorted(sum((batch.rows.tolist() for batch in examples.by_length(8)), [])) == list(range(101))
    small = list(examples.by_length(8, max_tokens=20))
    assert sorted(sum((batch.rows.tolist() for batch in small), [])) == list(range(101))
    assert all(len(batch.rows) == 1 or batch.input_ids.numel() <= 20 for batch in small)
    assert {len(batch.rows) for batch in small} - {1, 8}


def test_batches_have_similar_lengths(tokenized):
    examples = tokenized[1]
    assert len(examples) < POOL * 8
    padded = sum(batch.input_ids.numel() for batch in examples.shuffled(8, 0, 0))
    assert padded < 1.15 * examples.lengths.sum()


def test_a_subset_is_those_rows(tokenized):
    tokenizer, examples, first, second = tokenized
    rows = np.array([4, 50, 99])
    subset = TokenizedExamples(tokenizer, Examples(first, second, list(range(101))), rows)
    assert subset.labels.tolist() == rows.tolist()
    assert all((subset.ids[i] == examples.ids[row]).all() for i, row in enumerate(rows))


def test_what_was_cut_is_counted(tokenized):
    tokenizer, examples, first, second = tokenized
    words = [len(a.split()) + len(b.split()) for a, b in zip(first, second, strict=True)]
    assert examples.cut == sum(count > 24 - 3 for count in words) > 0


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
    tokenizer = tokenized[0]
    examples = TokenizedExamples(tokenizer, Examples(["not bad", "great"], None, None))
    assert examples.labels is None
    assert examples.batch(np.array([1])).to("cpu").targets is None
    probabilities = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float32)
    batch = examples.with_targets(probabilities).renumbered()[1].batch(np.array([1, 0]))
    assert batch.targets.numpy().dtype == np.float32
    assert batch.targets.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert examples.targets is None
