"""What a user need not give."""

from types import SimpleNamespace

import pytest

import train
from minisweet.branches import METHODS
from minisweet.runs.options import (
    EPOCHS,
    STEPS,
    default_batch_size,
    default_learning_rate,
    epochs_of,
    exit_layers_for,
    search_rates,
)


def test_every_depth_has_exit_layers():
    known = {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 6: (1, 2, 3, 6), 12: (1, 4, 6, 12), 24: (1, 6, 12, 24)}
    assert {depth: exit_layers_for(depth) for depth in known} == known
    for depth in range(1, 200):
        layers = exit_layers_for(depth)
        assert layers == tuple(sorted(set(layers)))
        assert (layers[0] >= 1, layers[-1]) == (True, depth)


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
        assert search_rates(shape(*model)) == [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]
    assert [default_batch_size(shape(*model)) for model in printed] == [16, 16, 16, 8]


@pytest.mark.parametrize(
    ("model", "rates"),
    [
        (("bert", 768, 12), {"ee": 5e-5, "mm": 3e-5, "sweet": 4e-5, "branch": 3e-5}),
        (("bert", 768, 6), dict.fromkeys(METHODS, 5e-5)),
        (("bert", 384, 6), dict.fromkeys(METHODS, 2e-4)),
        (("bert", 384, 12), dict.fromkeys(METHODS, 2e-4)),
        (("deberta", 1536, 48), dict.fromkeys(METHODS, 5e-5)),
    ],
)
def test_every_method_has_a_rate_and_branches_have_the_trunks(model, rates):
    assert {method: default_learning_rate(shape(*model), "mrpc", method) for method in METHODS} == pytest.approx(rates)
    by_size = 2e-4 if model[1] == 384 else 5e-5
    assert default_learning_rate(shape(*model), "my own", "branch") == by_size
    assert default_learning_rate(shape(*model), "mrpc", "branch", on_trunk=True) == by_size


@pytest.mark.parametrize("examples", [1, 15, 16, 17, 300, 1200, 5000, 10**6])
@pytest.mark.parametrize("batch_size", [1, 8, 16])
def test_epochs_make_the_steps_and_none_more_and_are_four_at_least(examples, batch_size):
    epochs, per_epoch = epochs_of(STEPS, examples, batch_size), -(-examples // batch_size)
    assert epochs >= EPOCHS == 4
    assert epochs * per_epoch >= STEPS
    assert epochs == 4 or (epochs - 1) * per_epoch < STEPS


@pytest.mark.parametrize("model_type", ["bert"])
def test_the_first_line_says_what_is_trained_and_why(command, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("minisweet.runs.options.STEPS", 9)
    rows = "".join(f"text number {n},{'ab'[n % 2]}\n" for n in range(40))
    (tmp_path / "own.csv").write_text("text,label\n" + rows)
    common = ["--model", model_dir, "--exit-layers", "1,4", "--max-length", 32, "--train-size", 48, "--out", "run"]
    own, size = ["--data", "own.csv", "--train-size", 32], "(for bert, 4 layers of 16)"
    cases = {
        (): f"method sweet (the paper's), learning rate 0.0002 {size}, 2 epochs of 3 steps of 16 examples (the "
        "paper's)",
        (*own,): f"method branch (for your own text), learning rate 0.0002, of branches 0.0004 {size}, 5 epochs of 2 "
        "steps of 16 examples (to make 9 steps, at least 4 epochs)",
        (*own, "--method", "ee", "--lr", "1e-3", "--epochs", 1): "method ee (as given), learning rate 0.001 (as "
        "given), 1 epoch of 2 steps of 16 examples (as given)",
    }
    for options, expected in cases.items():
        status, out, _ = command(train, *common, *options, "--overwrite")
        assert (status, out.splitlines()[0]) == (0, expected)
