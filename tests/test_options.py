"""What a user need not give, and what train.py says about it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from minisweet.branches import METHODS
from minisweet.runs import start
from minisweet.runs.start import EPOCHS, STEPS, default_learning_rate, epochs_of, exit_layers_for
from tests.conftest import write_model


def test_every_depth_has_exit_layers():
    papers = {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 6: (1, 2, 3, 6), 12: (1, 4, 6, 12), 24: (1, 6, 12, 24)}
    branches = {1: (0, 1), 6: (0, 6), 7: (0, 3, 7), 12: (0, 6, 12), 24: (0, 12, 24)}
    assert {depth: exit_layers_for(depth) for depth in papers} == papers
    assert {depth: exit_layers_for(depth, "branch") for depth in branches} == branches
    for depth in range(1, 100):
        for method in METHODS:
            layers = exit_layers_for(depth, method)
            assert (list(layers), layers[-1]) == (sorted(set(layers)), depth)
        assert exit_layers_for(depth, "branch", "lte") == exit_layers_for(depth)  # exit 0 learns no certainty


def shape(model_type: str, hidden_size: int, depth: int) -> SimpleNamespace:
    return SimpleNamespace(model_type=model_type, hidden_size=hidden_size, num_hidden_layers=depth)


def test_the_papers_settings_are_the_defaults():
    """Table 2 as printed: EE, MM and SWEET, in 1e-5, for SST-2, MRPC, CoLA, MNLI, QQP, QNLI and RTE."""
    printed = {
        ("bert", 768, 12): "5/5/5 5/3/4 4/4/5 5/5/5 5/5/5 5/4/5 5/5/4",
        ("bert", 1024, 24): "4/2/2 4/5/4 4/3/4 4/3/4 5/3/4 4/4/3 3/3/3",
        ("deberta", 768, 12): "3/3/3 4/5/5 4/5/4 2/4/3 4/5/5 3/4/3 2/1/4",
        ("deberta", 1024, 24): "2/4/3 3/2/1 3/3/2 2/2/2 2/2/3 3/2/1 1/2/2",
    }
    for model, row in printed.items():
        for task, rates in zip("sst2 mrpc cola mnli qqp qnli rte".split(), row.split(), strict=True):
            ours = [default_learning_rate(shape(*model), task, method) for method in ("ee", "mm", "sweet")]
            assert ours == pytest.approx([int(rate) * 1e-5 for rate in rates.split("/")])
        assert start.search_rates(shape(*model)) == [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]


@pytest.mark.parametrize(
    ("model", "rates"),
    [
        (("bert", 768, 12), {"ee": 5e-5, "mm": 3e-5, "sweet": 4e-5, "branch": 3e-5}),
        (("bert", 768, 6), dict.fromkeys(METHODS, 5e-5)),
        (("bert", 384, 6), dict.fromkeys(METHODS, 2e-4)),
        (("deberta", 1536, 48), dict.fromkeys(METHODS, 5e-5)),
    ],
)
def test_every_method_has_a_rate_and_branches_have_the_trunks(model, rates):
    assert {method: default_learning_rate(shape(*model), "mrpc", method) for method in METHODS} == pytest.approx(rates)
    by_size = 2e-4 if model[1] == 384 else 5e-5
    assert default_learning_rate(shape(*model), None, "branch") == by_size


@given(examples=st.integers(1, 10**6), batch_size=st.sampled_from([1, 8, 16]))
def test_epochs_make_the_steps_and_none_more_and_are_four_at_least(examples, batch_size):
    epochs, per_epoch = epochs_of(examples, batch_size), -(-examples // batch_size)
    assert epochs >= EPOCHS == 4
    assert epochs * per_epoch >= STEPS
    assert epochs == 4 or (epochs - 1) * per_epoch < STEPS


def test_the_first_lines_say_what_is_trained_on_what(command, tmp_path, monkeypatch):
    model = write_model(tmp_path / "tiny", "bert")
    monkeypatch.setattr("minisweet.runs.start.STEPS", 9)
    rows = [f"text number {n} is not good and not bad,{'ab'[n % 2]}\n" for n in range(40)]
    Path("own.csv").write_text("text,label\n ,a\n" + "".join(rows))
    Path("dev.csv").write_text("text,label\n" + rows[0] + "a film,a\n")
    common, new = ["--max-length", 8, "--train-size", 20, "--out", "run"], ["--model", model, "--exit-layers", "1,4"]
    own = ["--data", "own.csv", "--dev-data", "dev.csv"]
    for arguments, expected in {
        (*new,): "method sweet, lr 0.0002, epochs 2",
        (*new, *own, "--method", "ee", "--lr", "1e-3", "--epochs", 1): "method ee, lr 0.001, epochs 1",
        ("--model", model, *own): "method branch, lr 0.0002, epochs 5",
        ("--trunk", "first", *own): "method branch, no layer is trained: the trunk stays as it is",
    }.items():
        if "--trunk" in arguments:
            Path("run").rename("first")
        status, out, err = command(train, *common, *arguments, "--overwrite")
        assert (status, out.splitlines()[:1]) == (0, [expected]), err
    first, *lines = out.splitlines()[1:-1]
    assert "first, own: exits after layers 0,4 of 4, seed 0, " in first
    counts = re.fullmatch(r"train: 20 of 40 rows: a (\d+), b (\d+)", lines[0])
    assert sum(map(int, counts.groups())) == 20
    assert lines[1:] == [
        "validation: 2 rows: a 2, b 0",
        "train: empty texts, skipped: 1",
        "texts that are in both train and validation: 1",
        "train: cut to 8 tokens: 20",
    ]
