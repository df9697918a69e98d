"""The cross-fitted confidences, and evaluate.py as a command."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
from minisweet.base.files import read_json, write_json
from minisweet.confidence import CRITERIA, confidence, crossfit, exits_taken, folds, rows_of
from minisweet.exits import Answer
from minisweet.loading import read_config
from minisweet.metrics import area_under_curve, score
from minisweet.run import read_run
from minisweet.tasks import load_examples
from minisweet.texts import Texts, load_tokenizer


@pytest.fixture
def copied(run_of, tmp_path):
    """A function that copies a finished run, which may be changed."""
    return lambda name: shutil.copytree(run_of(name), tmp_path / f"my {name}")


def saved(folder: Path) -> tuple[list[Answer], np.ndarray, np.ndarray]:
    """The answers, labels and keys of logits.safetensors."""
    tensors = load_file(folder / "logits.safetensors")
    certainty = tensors.get("certainty", [None] * len(tensors["logits"]))
    answers = [Answer(*of_exit) for of_exit in zip(tensors["logits"], certainty, strict=True)]
    return answers, tensors["labels"].numpy(), tensors["keys"].numpy()


def test_folds_take_turns_and_each_gets_the_confidences_of_what_was_fitted_on_the_others():
    logits = torch.randn(3, 103, 3, generator=torch.Generator().manual_seed(5)).mul(2).round()  # with many ties
    labels, keys = np.arange(103) % 3, np.random.default_rng(0).permutation(103)
    answers = [Answer(of_exit) for of_exit in logits]
    found, fold = crossfit("confidence", answers, labels, keys), folds(labels, keys)
    assert np.ptp([np.bincount(labels[fold == n], minlength=3) for n in range(5)], axis=0).max() <= 1
    assert (folds(labels[::-1], keys[::-1]) == fold[::-1]).all()
    temperatures = set()
    for n in range(5):
        own, others = torch.from_numpy(fold == n), torch.from_numpy(fold != n)
        for k, answer in enumerate(answers):
            fitted = CRITERIA["confidence"].fit(rows_of(answer, others), torch.from_numpy(labels)[others])
            assert torch.equal(found[k, own], confidence("confidence", rows_of(answer, own), fitted))
            temperatures.add((k, *fitted))
    assert len(temperatures) == 15
    thrice = [rows_of(answers[1], torch.tensor([7, 7, 7]))], labels[[7, 7, 7]], keys[[7, 7, 7]]
    assert len({*folds(*thrice[1:])}) == 1  # equal texts share a fold, and a single text has no others
    assert crossfit("confidence", *thrice).isfinite().all()


@pytest.mark.parametrize("name", ["sweet", "mm", "lte"])
def test_an_evaluation_is_whole_and_the_same_again(copied, command, monkeypatch, name):
    folder = copied(name)
    before = read_json(folder / "evaluation.json")
    (folder / "evaluation.json").write_text("{broken")
    drawn = []
    save = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(save, lambda figure, path, **_: drawn.append((figure.axes[0].lines, path.write_bytes(b"PNG"))))
    status, out, err = command(evaluate, folder)
    assert (status, err, (folder / "curve.png").read_bytes()) == (0, "", b"PNG")
    run, after = read_run(folder), read_json(folder / "evaluation.json")
    (((line,), _),) = drawn
    assert line.get_xydata().tolist() == list(map(list, zip(after["speedup_ratios"], after["scores"], strict=True)))
    assert {key for key in before if before[key] != after[key]} <= {"seconds", "device"}
    answers, labels, keys = saved(folder)
    rows = run.examples("dev")
    assert (answers[0].certainty is None, after["precision"]) == (name != "lte", "torch.float32")
    texts = Texts(load_tokenizer(folder, read_config(folder).vocab_size, run.max_length), rows)
    assert (labels.tolist(), keys.tolist()) == (rows.labels, texts.keys.tolist())
    # The curve, from the saved answers.
    sure, N = crossfit(run.exit_strategy, answers, labels, keys), len(labels)
    assert after["thresholds"] == np.linspace(0.0 if name == "lte" else 0.5, 1, 11).tolist()
    taken = np.stack([exits_taken(sure, threshold) for threshold in after["thresholds"]])  # (P, N)
    assert after["exit_counts"] == [[(row == k).sum() for k in range(3)] for row in taken]
    costs = np.array([1, 3, 7] if name == "mm" else [1, 2, 4]) / 4
    assert after["speedup_ratios"] == pytest.approx(costs[taken].mean(1).tolist())
    predictions = np.stack([answer.logits.argmax(-1) for answer in answers])
    right = predictions[taken, np.arange(N)] == labels
    assert after["scores"] == pytest.approx((100 * right.mean(1)).tolist())
    assert after["exit_scores"] == pytest.approx((100 * (predictions == labels).mean(1)).tolist())
    assert after["exit_answers"] == [len({*row}) for row in predictions]
    assert after["area"] == area_under_curve(after["speedup_ratios"], after["scores"], 1 / 4)
    assert after["majority"] == pytest.approx(100 * np.bincount(labels).max() / N)
    of_all = [CRITERIA[run.exit_strategy].fit(answer, torch.from_numpy(labels)) for answer in answers]
    assert (after["id"], after["fitted"]) == (run.id, [pytest.approx(own) for own in of_all])
    assert f"\n{1:9.3f}{after['scores'][-1]:8.1f}{after['speedup_ratios'][-1]:15.3f}" in out
    assert f"to answer new texts: python evaluate.py '{folder}' --predict" in out
    assert ("predicts one class for all rows" in out) == (1 in after["exit_answers"])


@pytest.mark.parametrize("name", ["sweet", "mm", "lte"])
def test_new_texts_are_answered_as_the_sweep_decides(copied, command, monkeypatch, name):
    monkeypatch.setattr(evaluate, "WINDOW", 60)
    folder = copied(name)
    run, found = read_run(folder), read_json(folder / "evaluation.json")
    answers, rows = saved(folder)[0], run.examples("dev")
    of_exits = zip(answers, found["fitted"], strict=True)
    sure = torch.stack([confidence(run.exit_strategy, answer, fitted) for answer, fitted in of_exits])  # (K, N)
    distinct = sure[0].unique()
    quarter = len(distinct) // 4
    widest = quarter + int(distinct.diff()[quarter:-quarter].argmax())  # of the gaps that leave about half on each side
    threshold = float(distinct[widest : widest + 2].mean())
    taken = exits_taken(sure, threshold).numpy()
    labels = np.stack([answer.logits.argmax(-1) for answer in answers])[taken, np.arange(len(taken))]
    assert len({*taken}) > 1
    Path("new.tsv").write_text("note\tsentence\n" + "".join(f"\t{text}\n" for text in [*rows.first, " "]) + "\n")
    words = folder, "--predict", "new.tsv", "--threshold", threshold
    status, out, err = command(evaluate, *words)
    *lines, space, blank = [line.split("\t") for line in out.splitlines()]
    assert (status, err, space) == (0, "", blank)
    assert [label for label, _, _ in lines] == [run.labels[label] for label in labels]
    assert [int(layer) for _, _, layer in lines] == np.array(run.exit_layers)[taken].tolist()
    expected = sure.numpy()[taken, np.arange(len(taken))]
    np.testing.assert_allclose([float(value) for _, value, _ in lines], expected, atol=2e-5)
    # Files without a header line, as of CoLA, and GLUE's file of new texts, which has one.
    write_json(folder / "run.json", read_json(folder / "run.json") | {"header": ["source", "mark", "sentence"]})
    assert command(evaluate, *words)[1] == out
    Path("new.tsv").write_text("a\t\tthe film\n")
    assert command(evaluate, *words)[1].count("\n") == 1
    monkeypatch.setattr("minisweet.exits.ExitHead.pooled", lambda head, x: x * np.nan)
    assert "new.tsv: the exits give infinite numbers or NaN" in command(evaluate, *words)[2]


def test_metric_and_precision_are_those_that_are_asked_for(copied, command, monkeypatch):
    folder = copied("sweet")
    write_json(folder / "run.json", read_json(folder / "run.json") | {"metric": "matthews"})
    before = saved(folder)[0]
    assert command(evaluate, folder, "--amp", "bf16", "--thresholds", 3)[0] == 0
    (answers, labels, _), after = saved(folder), evaluate.read_evaluation(folder)
    assert (after["metric"], after["precision"]) == ("matthews", "torch.bfloat16")
    assert after["thresholds"] == [0.5, 0.75, 1]
    assert not torch.equal(before[0].logits, answers[0].logits)
    predictions = np.stack([answer.logits.argmax(-1) for answer in answers])
    assert after["exit_scores"] == pytest.approx(score(predictions, labels, "matthews").tolist())
    assert after["majority"] == 0
    # Prediction uses the evaluation's precision, and no other.
    Path("new.tsv").write_text("sentence\nthe film was superb\n")
    words, seen, answer = (folder, "--predict", "new.tsv", "--threshold", 0.8), [], evaluate.early_exit
    enabled = lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or answer(*args)  # noqa: E731
    monkeypatch.setattr(evaluate, "early_exit", enabled)
    assert (command(evaluate, *words)[0], command(evaluate, *words, "--amp", "bf16")[0], seen) == (0, 0, [True, True])
    message = f"--amp: off, but {folder} was evaluated with bf16; evaluate it again with --amp off"
    assert message in command(evaluate, *words, "--amp", "off")[2]
    monkeypatch.setattr("minisweet.exits.ExitHead.pooled", lambda head, x: x * np.nan)
    assert (command(evaluate, folder)[0], evaluate.read_evaluation(folder)) == (2, after)


def test_the_criterion_is_the_one_that_is_asked_for(copied, command, monkeypatch):
    """The confidence of exits that were trained for learning-to-exit. A criterion of one's own is in test_exercises."""
    folder = copied("lte")
    assert command(evaluate, folder, "--criterion", "confidence")[0] == 0
    (answers, labels, _), found = saved(folder), evaluate.read_evaluation(folder)
    fitted = [CRITERIA["confidence"].fit(answer, torch.from_numpy(labels)) for answer in answers]
    assert (found["criterion"], found["thresholds"][0], found["fitted"]) == ("confidence", 0.5, fitted)
    monkeypatch.delitem(CRITERIA, "confidence")  # as by another file than that of the learner
    _, _, err = command(evaluate, folder, "--predict", "new.tsv", "--threshold", 0.3)
    assert "my lte: evaluated by confidence, and CRITERIA has lte" in err


def test_files_of_another_run_and_other_rows_are_refused(copied, run_of, command, tmp_path, monkeypatch):
    folder = copied("sweet")
    (folder / "model.safetensors").unlink()  # as in an archive of results
    assert command(evaluate, folder, "--plot", "a.png")[0] == 0
    shutil.copy(run_of("ee") / "evaluation.json", folder / "evaluation.json")
    _, _, err = command(evaluate, folder, "--plot", "a.png")
    assert "evaluation.json: belongs to other weights than the model beside it" in err
    folder = copied("ee")
    others = lambda *where: (rows := load_examples(*where))._replace(labels=rows.labels[::-1])  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("minisweet.run.load_examples", others)
        _, _, err = command(evaluate, folder, "--data-dir", tmp_path)
    assert f"--data-dir: {tmp_path}: its dev rows of toy are not those of the training" in err
    shutil.copy(run_of("sweet") / "model.safetensors", folder)
    assert f"{folder}/model.safetensors: belongs to another run than run.json beside it" in command(evaluate, folder)[2]


def test_without_a_run_it_takes_the_newest_that_is_whole(copied, command, tmp_path):
    assert "no run of train.py here" in command(evaluate)[2]
    run = shutil.move(copied("ee"), tmp_path / "runs" / "newer")
    for name, time in (("older", 1e9), (".written", 1e10)):  # the other is being written
        path = shutil.copytree(run, tmp_path / "runs" / name) / "run.json"
        os.utime(path, (time, time))
    (tmp_path / "runs" / "old").mkdir()  # of an earlier version
    write_json(tmp_path / "runs" / "old" / "run.json", {"id": "1", "arguments": {}})
    assert command(evaluate)[1].startswith(f"{run.relative_to(tmp_path)}: ")
    assert "a run of minisweet fit (see minisweet test --help) or of an earlier" in command(evaluate, "runs/old")[2]
