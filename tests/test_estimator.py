"""EarlyExitClassifier in Python: what scikit-learn expects of it, what it trains, and what it answers."""

import copy
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from minisweet import EarlyExitClassifier
from minisweet.base.files import LOG
from minisweet.classifier.estimator import PARAMETERS
from minisweet.classifier.main import predict
from minisweet.classifier.main import test as check
from minisweet.classifier.promise import Goal
from tests.conftest import opinions, refused, write_rows

TEXTS = ["the film was superb", "a dull film", "", "not bad , it is great", "the film"]


@pytest.fixture
def new(own_run):
    """A function that makes a classifier to train, of the tiny model, in no time."""
    quick = {"model": str(own_run.parent / "tiny"), "max_length": 32, "amp": "off", "lr": 3e-3, "epochs": 1}
    return lambda **options: EarlyExitClassifier(**quick | {"max_lost": 40, "sure": 60} | options)


def opinions_of(part: slice) -> tuple[list[str], list[str]]:
    return tuple(map(list, zip(*opinions(1000)[part], strict=True)))


def test_the_example_of_its_docstring(new, own_run):
    texts, labels = opinions_of(slice(100))
    classify = new(model=own_run.parent / "tiny")  # a path is text, too
    random_state = torch.get_rng_state()
    assert classify.fit(texts, labels) is classify
    assert torch.get_rng_state().equal(random_state)
    assert classify.predict(texts).tolist() == [answer.label for answer in classify.classify(texts)]
    assert classify.classes_.tolist() == ["down", "up"]
    np.testing.assert_allclose(classify.predict_proba(texts).sum(1), 1, atol=1e-6)
    assert classify.score(texts, labels) == np.mean(classify.predict(texts) == np.array(labels)) > 0.8
    assert classify.choose(max_lost=20, sure=55).operating_point.goal == Goal(max_lost=20, sure=55)
    full = classify.choose(max_lost=0.01)
    assert {answer.exit_layer for answer in full.classify(texts)} == {4}
    assert classify.choose(max_lost=99).operating_point.share < 0.5


def test_scikit_learn_takes_it(new):
    base = pytest.importorskip("sklearn.base")
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    classify, (texts, labels) = new(), opinions_of(slice(60))
    clone = base.clone(classify.set_params(seed=3))
    assert clone.get_params() == classify.get_params() != new().get_params()
    assert (base.is_classifier(clone), hasattr(clone, "classes_")) == (True, False)
    assert cross_val_score(classify, texts, np.array(labels), cv=2).mean() > 0.6
    strip = FunctionTransformer(lambda texts: [text.removeprefix("> ") for text in texts])
    pipeline = Pipeline([("strip", strip), ("classify", clone)]).fit([f"> {text}" for text in texts], labels)
    assert pipeline.predict(texts).tolist() == clone.predict(texts).tolist()
    assert pipeline.predict_proba(texts).shape == (60, 2)


def test_columns_are_in_the_order_of_numpy(new):
    texts, labels = opinions_of(slice(60))
    classify = new().fit(texts, ["2" if label == "up" else "10" for label in labels])
    assert (classify.cascade.labels, classify.classes_.tolist()) == (["2", "10"], ["10", "2"])
    assert classify.classes_[classify.predict_proba(texts).argmax(1)].tolist() == classify.predict(texts).tolist()


def test_without_labels_a_trunk_is_enough_and_its_labels_keep_their_type(new, tmp_path):
    texts, trunk = opinions_of(slice(80))[0], str(tmp_path / "trunk")
    new().fit(texts, [n % 3 for n in range(80)]).save(trunk)
    beside = {"model": "minilm-l6", "lr": None, "epochs": None, "trunk": trunk}
    classify = new(**beside).fit(None, None, unlabelled=opinions_of(slice(100, 200))[0])
    assert (classify.classes_.tolist(), classify.operating_point.labelled_judges) == ([0, 1, 2], 0)
    some = new(**beside)
    others = opinions_of(slice(300, 340))[0]  # which the trunk has not seen
    some.fit(others, ["02"[n % 2] if n % 3 else None for n in range(40)]).save(tmp_path / "some")
    again = EarlyExitClassifier.load(tmp_path / "some")
    assert (again.classes_.tolist(), again.trunk) == ([0, 1, 2], trunk)
    for few, message in (([], "no text is left to learn from"), (["a film"], "too few validation texts")):
        assert message in refused(new(**beside).fit, None, None, unlabelled=few)
    for option, value in (("model", "x"), ("lr", 1.0), ("epochs", 1)):
        told = f"{option}: cannot be combined with a trunk: only the bag of words is trained then"
        assert refused(new(**beside | {option: value}).fit, None, None, unlabelled=texts) == told


def test_rows_to_validate_on_and_more_unlabelled_texts(new):
    texts, labels = opinions_of(slice(90))
    more = texts[15:50] + texts[70:]  # the more, so that the model learns of them
    classify = new().fit(np.array(texts[:15]), labels[:15], unlabelled=more, validation=(texts[50:70], labels[50:70]))
    assert list(classify.record.losses) == ["fine-tuning", "learning from its own answers"]
    assert classify.validation.texts.examples.first == texts[50:70]


GOOD = opinions_of(slice(40))
BAD = [
    (GOOD[0], GOOD[1][:3], {}, "labels: 3, should be as many as the texts, 40"),
    (None, None, {}, "texts: None, should be a list"),
    (GOOD[0], [1, "x"] * 20, {}, "labels: int and str are mixed, should be of one type"),
    (*GOOD, {"validation": (["a"], [1])}, "labels: int and str are mixed, should be of one type"),
    (GOOD[0], [HTTPStatus.OK] * 40, {}, "item 0: <HTTPStatus.OK: 200> is not a label, should be text or a number"),
    (GOOD[0], ["x", "y\0"] * 20, {}, r"labels: NumPy changes some, or mixes them up: 'x', 'y\x00'; rename them"),
    (*GOOD, {"dev_size": 200}, "dev_size: '200', should be "),
    (*GOOD, {"epochs": True}, "epochs: 'True', should be a whole number from 1 to "),
    (*GOOD, {"seed": None}, "seed: 'None', should be a whole number from 0 to "),
    (*GOOD, {"unlabelled": ["a", 5]}, "unlabelled: item 1: 5, should be one text"),
    (*GOOD, {"max_lost": float("nan")}, "max_lost: 'nan', should be a number from 0.01 to 99.99"),
    (*GOOD, {"groups": ["a"]}, "groups: 1, should be as many as the texts, 40"),
    (*GOOD, {"unlabelled": ["a"], "unlabelled_groups": "a"}, "unlabelled_groups: 'a', should be a list"),
    (*GOOD, {"unlabelled_groups": ["a"]}, "unlabelled_groups: needs unlabelled"),
    ([" "] * 40, GOOD[1], {}, "texts: all of them are empty"),
    (*GOOD, {"unlabelled": ["", " "]}, "unlabelled: all of them are empty"),
    (*GOOD, {"model": None}, "model: None, should be a name or a folder"),
    (*GOOD, {"validation": ([], [])}, "validation: has no rows"),
    (*GOOD, {"validation": (["a"],)}, "validation: should be (texts, labels)"),
]


@pytest.mark.parametrize(("texts", "labels", "options", "message"), BAD, ids=[row[3] for row in BAD])
def test_what_cannot_be_trained_on_is_named(new, monkeypatch, texts, labels, options, message):
    monkeypatch.setattr("minisweet.classifier.training.fine_tune", None)  # nothing is trained before
    of_fit = {name: options[name] for name in options.keys() - PARAMETERS.keys()}
    classify = new(**{name: options[name] for name in options.keys() & PARAMETERS.keys()})
    assert refused(classify.fit, texts, labels, **of_fit).startswith(message)


def test_a_second_fit_that_fails_leaves_the_first_model_whole(new, tmp_path, monkeypatch):
    """Where the training diverges, and where it is over and choosing fails."""
    classify, texts = new().fit(*GOOD), GOOD[0]
    before = classify.classify(texts)
    for lr, size, step in ((1e30, 8, 2), (1e39, 64, 1)):  # no loss sees the last update
        error = refused(classify.set_params(lr=lr, batch_size=size).fit, texts, ["x", "y"] * 20)
        assert error == f"lr: at {lr:g} the loss became infinite or NaN at step {step}; try a lower one"
    with monkeypatch.context() as patch:
        patch.setattr("minisweet.classifier.estimator.choose", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            classify.set_params(lr=3e-3).fit(texts, ["x", "y"] * 20)
    assert classify.classify(texts) == before
    classify.save(tmp_path / "run")
    assert EarlyExitClassifier.load(tmp_path / "run").classify(texts) == before
    assert classify.choose(max_lost=99).classes_.tolist() == ["down", "up"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda classify: pickle.loads(pickle.dumps(classify))])
def test_a_copy_needs_neither_the_original_nor_its_folder(own_run, tmp_path, copied):
    original = EarlyExitClassifier.load(shutil.copytree(own_run, tmp_path / "run"))
    classify, expected = copied(original), original.classify(TEXTS)
    del original
    shutil.rmtree(tmp_path / "run")
    classify.save(tmp_path / "saved")
    for again in (classify, EarlyExitClassifier.load(tmp_path / "saved")):
        assert again.classify(TEXTS) == expected
        assert again.choose(max_lost=99).operating_point.share < 0.5


def frame(*columns: list) -> object:
    """What a frame or a series of pandas is to us."""
    kind = type("Frame", (), {"__array__": lambda *_, **options: np.array(columns, dtype=object).T})
    return kind()


def test_frames_series_and_columns_are_taken_and_another_length_is_not(new, caplog):
    texts, labels = opinions_of(slice(60))
    classify = new().fit(frame([*texts, " "]), frame([*labels[:-1], None, "up"]))
    assert "empty texts, skipped: 1" in caplog.text
    assert classify.predict(frame(texts)).tolist() == classify.predict(texts).tolist()
    expected = classify.score(texts, labels)
    for y in (frame(labels), np.array(labels)[:, None], iter(labels)):
        assert classify.score(frame(texts), y) == expected > 0.6
    assert refused(classify.score, [], []) == "texts: there are none"
    assert refused(classify.score, texts, [float("nan")] * 60) == "item 0: has no label"


def test_verbose_tells_and_else_it_is_silent_on_a_terminal_too(new, capsys, monkeypatch):
    monkeypatch.setattr(LOG, "handlers", [])  # of commands that were tested before
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    texts, labels = opinions_of(slice(60))
    for verbose in (0, 1):
        classify = new(verbose=verbose).fit(texts, labels)
        told = capsys.readouterr().err
        assert ("rows to train on" in told, "fine-tuning" in told) == (bool(verbose),) * 2
    assert classify.get_params()["verbose"] == 1


def test_what_the_commands_do_is_done_from_python_and_they_take_its_run(new, tmp_path, command):
    texts, labels = opinions_of(slice(100))
    classify = new().fit(texts, labels, groups=[n // 2 for n in range(100)])
    assert classify.summary().splitlines()[-1] == classify.promise
    others = opinions_of(slice(300, 400))
    found = classify.test(*others)
    assert found["score"] == pytest.approx(100 * classify.score(*others), abs=3)  # texts that it has seen do not count
    assert {"score", "macro_f1", "lost"} < found.keys() - {"per_class"} < vars(classify.operating_point).keys()
    assert sum(found["per_class"]["support"]) == found["judging_texts"]
    assert "no row is left to test on" in refused(classify.test, texts, labels)
    assert classify.test([f"{text} ." for text in others[0]], [None] * 100)["score"] is None
    first, last = (explained[-1][0] for explained in classify.explain(texts[:2]))
    assert [first.exit_layer, last.exit_layer] == [4, 4]
    assert refused(classify.export, tmp_path / "other").endswith("other: should end in .onnx")
    classify.save("run")
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    assert refused(classify.save, "mine", overwrite=True) == "out: mine exists and is not a run; name another folder"
    assert Path("mine/thesis.txt").exists()
    classify.save("run", overwrite=True)
    rows = [(*row, f"new {n // 4}") for n, row in enumerate(zip(*others, strict=True))]
    write_rows(Path("new.csv"), rows, "text", "label", "group")
    assert command(predict, "run", "new.csv", "--out", "p.csv")[0] == 0
    assert "\n25 rows, threshold" in command(check, "run", "new.csv")[1]


def test_what_cannot_be_answered_loaded_or_set_is_named(new, own_run, tmp_path):
    for call in (lambda: new().predict(["a"]), new().choose, lambda: new().save(tmp_path / "a")):
        assert "not trained yet; call fit, or EarlyExitClassifier.load" in refused(call)
    assert refused(new().set_params, max_loss=1).startswith("max_loss: unknown parameter, should be one of model, ")
    assert refused(new(trunk="").fit, ["a"] * 9, ["x"] * 9) == "trunk: '', should be a name or a folder"
    load = EarlyExitClassifier.load
    assert refused(load(own_run).predict, ["a", None]) == "item 1: None, should be one text"
    assert refused(load, own_run, amp="bfloat16").startswith("amp: 'bfloat16', should be one of auto, off")
    assert refused(load, own_run, threshold=1.5) == "threshold: '1.5', should be a number from 0 to 1"


def test_any_number_of_texts_in_order(own_run):
    classify = EarlyExitClassifier.load(own_run, threshold=0.75)
    alone = [classify.classify([text])[0] for text in TEXTS]
    many = iter(TEXTS * 300)  # more than are gathered at once
    for answer, expected in zip(classify.classify(many), alone * 300, strict=True):
        assert (answer.label, answer.exit_layer) == (expected.label, expected.exit_layer)
        assert answer.confidence == pytest.approx(expected.confidence, abs=1e-6)
        assert list(answer.probabilities) == classify.cascade.labels
    both = [EarlyExitClassifier.load(own_run, threshold=1, amp=amp).predict_proba(TEXTS) for amp in ("off", "bf16")]
    assert 0 < np.abs(both[0] - both[1]).max() < 0.05


def test_threads_share_a_classifier_while_one_chooses(own_run):
    """All answers are of one of the goals, and of no mixture."""
    classify, goals = EarlyExitClassifier.load(own_run), [0.01, 10, 99]
    right = [classify.choose(max_lost=most).classify(TEXTS) for most in goals]
    assert right[0] != right[2]
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(classify.classify, TEXTS) for _ in range(100)]
        for most in goals * 10:
            classify.choose(max_lost=most)
        assert all(future.result() in right for future in found)


def test_the_goal_is_the_constructors_and_what_was_not_chosen_promises_nothing(own_run, caplog, tmp_path):
    """Another threshold, and another precision than that in which it was judged."""
    classify = EarlyExitClassifier.load(own_run, threshold=0.5, amp="off")
    assert classify.promise == "threshold 0.5 is not the one that was chosen, so nothing is promised"
    assert classify.set_params(max_lost=40).choose().operating_point.goal == Goal(max_lost=40)
    assert classify.promise.startswith(f"On {classify.operating_point.judging_texts} of your texts")
    for goal in ({"max_lost": 20.0}, {"sure": 80.0}):
        assert classify.choose(**goal).operating_point.goal == Goal(**{"max_lost": 40} | goal)
    classify.choose(max_lost=40).save(tmp_path / "fast")
    before = (tmp_path / "fast" / "logits.safetensors").read_bytes()
    for options in ({"threshold": 0.9, "amp": "bf16"}, {"amp": "off"}, {"amp": "bf16"}):
        other = EarlyExitClassifier.load(tmp_path / "fast", **options)
    told = [record.getMessage() for record in caplog.records if "promise" in record.getMessage()]
    assert told == ["the promise was made in torch.float32, and this is torch.bfloat16: choose again with --amp bf16"]
    assert other.promise == told[0]
    assert other.choose().operating_point.precision == "torch.bfloat16"
    assert other.promise.startswith("On ")
    assert (tmp_path / "fast" / "logits.safetensors").read_bytes() == before  # a folder that is loaded stays as it is
