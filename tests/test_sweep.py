"""All exits on all rows: predictions in order, folds that leave no row to its own rule, and the sweep itself."""

import numpy as np
import pytest
import torch

from minisweet.adaptive import ExitRule, Exits, exits_taken, spaced_thresholds
from minisweet.base.files import InputError
from minisweet.data.rows import Examples
from minisweet.data.tasks import text_digest
from minisweet.evaluation.records import read_evaluation
from minisweet.evaluation.sweep import (
    Validation,
    crossfit,
    curve_of,
    load_validation,
    never_predicted,
    sweep,
    text_keys,
)
from minisweet.runs.folders import read_record, read_validation
from tests.test_operating import random_validation

EVERY = np.arange


@pytest.mark.parametrize("parts", [4, 5])
def test_parts_are_drawn_class_by_class_and_equal_texts_stay_together(parts):
    N = 200
    validation = random_validation(0, (1, 2), N)._replace(labels=torch.arange(N) % 2)  # a file whose labels alternate
    found = validation.parts(parts)
    assert np.bincount(2 * found + EVERY(N) % 2).tolist() == [N // parts // 2] * (2 * parts)
    order = np.random.default_rng(1).permutation(N)
    assert validation.take(order).parts(parts).tolist() == found[order].tolist()
    repeated = validation.take(np.random.default_rng(2).integers(20, size=N))
    found, keys = repeated.parts(parts), repeated.keys.numpy()
    assert all(len(set(found[keys == key])) == 1 for key in keys)
    assert len(set(found)) == parts
    # a text under two labels is in one part too
    both = repeated._replace(labels=torch.from_numpy(np.random.default_rng(3).integers(2, size=N)))
    assert all(len(set(both.parts(parts)[keys == key])) == 1 for key in keys)


def test_folds_take_turns_and_each_is_decided_by_the_rule_of_the_others():
    validation = random_validation(5, (1, 2, 4), 103, 3)
    folds = validation.folds()
    assert len(folds) == 5
    assert sorted(np.concatenate([rows for _, rows in folds])) == list(range(103))
    assert all(sorted([*others, *rows]) == list(range(103)) for others, rows in folds)
    thresholds, turns = spaced_thresholds(7, 1 / 3), crossfit(validation)
    for (rule, rows), (others, _) in zip(turns, folds, strict=True):
        assert not {*rows} & {*others}
        assert torch.equal(rule.temperatures, validation.take(others).fit_rule().temperatures)
    assert len({tuple(rule.temperatures.tolist()) for rule, _ in turns}) == 5
    _, taken = sweep(turns, validation, thresholds)
    for rule, rows in turns:
        confidence = rule.confidences(validation.logits[:, rows])
        for i, threshold in enumerate(thresholds):
            assert taken[i, rows].tolist() == exits_taken(confidence, threshold, rule.lowest).tolist()
    ((others, rows),) = validation.take([7, 7, 7]).folds()  # a single text
    assert others.tolist() == rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
@pytest.mark.parametrize("layers", [(1, 2, 4), (0, 2, 4)])
def test_the_sweep_of_some_exits_is_that_of_a_model_that_has_no_others(method, layers):
    validation, rule = random_validation(2, layers, 60, 2, method), ExitRule(2, torch.tensor([0.7, 1.1, 2.0]))
    thresholds = spaced_thresholds(9, 0.5)
    places = [0, 2]
    some, taken = sweep([(rule, EVERY(60))], validation, thresholds, places)
    kept = Validation(validation.logits[places], None, *validation[2:5], Exits((layers[0], 4), 4, method))
    alone, its_taken = sweep([(rule.kept(places), EVERY(60))], kept, thresholds)
    assert np.array_equal(taken, np.array(places)[its_taken])
    for key in ("scores", "speedup_ratios", "area"):
        assert some[key] == pytest.approx(alone[key])
    assert [row[1] for row in some["exit_counts"]] == [0] * 9
    assert (some["speedup_ratios"][0], some["scores"][0]) == pytest.approx((layers[0] / 4, some["exit_scores"][0]))
    assert some["scores"][-1] == pytest.approx(some["exit_scores"][-1])


def test_keys_are_the_digests_that_training_keeps():
    rows = Examples(["a", "b", "a", "a"], ["x", "y", "x", "y"], None)
    keys = [f"{key % 2**64:016x}" for key in text_keys(rows.texts()).tolist()]
    assert keys[0] == keys[2]
    assert sorted(set(keys)) == sorted({*map(text_digest, rows.texts())})
    validation = random_validation(0, (1, 2), 4)._replace(keys=text_keys(rows.texts()))
    assert validation.effective_rows() == pytest.approx(16 / (4 + 1 + 1))


def test_the_curve_tells_of_each_exit():
    validation = random_validation(1, (1, 2, 4), 50, 3)
    curve = curve_of(validation, crossfit(validation), [1 / 3, 0.9, 1.0])
    assert [len(curve[key]) for key in ("class_counts", "per_class", "exit_scores")] == [3, 3, 3]
    assert {when: len(values) for when, values in curve["nll"].items()} == {"before": 3, "after": 3}
    assert sum(curve["nll"]["after"]) < sum(curve["nll"]["before"])


def test_warnings_name_classes_that_are_never_predicted():
    labels = torch.tensor([0] * 20 + [1] * 6 + [2] * 4)
    logits = torch.nn.functional.one_hot(torch.stack([labels * 0, labels]), 3).float()
    validation = Validation(logits, None, labels, torch.arange(30), "accuracy", Exits((0, 4), 4, "sweet"))
    (line,) = never_predicted(validation, ["no", "yes", "rare"])
    assert "the exit after layer 0 never predicts yes: " in line  # and of four rows nothing is said
    assert not never_predicted(validation._replace(metric="agreement"), ["no", "yes", "rare"])


@pytest.mark.parametrize("name", ["branch", "lte", "pairs", "trunk0"])
def test_a_saved_evaluation_is_read_as_it_was(run_of, name, tmp_path):
    run = run_of(name)
    record, evaluation = read_record(run), read_evaluation(run)
    validation, rows = load_validation(run, evaluation, record), read_validation(run, record)
    K, N = len(evaluation.exit_layers), evaluation.examples
    assert (validation.logits.shape, len(rows.first)) == ((K, N, record.num_labels), N)
    assert (validation.certainty is not None) == (name == "lte")
    assert validation.labels.tolist() == rows.labels
    assert torch.equal(validation.keys, text_keys(rows.texts()))
    curve, _ = sweep(crossfit(validation), validation, evaluation.thresholds)
    assert [curve[key] for key in ("scores", "area")] == [evaluation.scores, evaluation.area]
    with pytest.raises(InputError, match="has no evaluation.json; first: evaluate.py"):
        read_evaluation(tmp_path)
    with pytest.raises(InputError, match="logits.safetensors: not readable.*evaluate again"):
        load_validation(tmp_path, evaluation, record)
