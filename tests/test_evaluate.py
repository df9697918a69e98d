"""The cross-fitted sweep, and evaluate.py as a command."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from minisweet.adaptive import Exits, exits_taken
from minisweet.base.files import read_json, write_json
from minisweet.calibration import fit_rule
from minisweet.metrics import area_under_curve, score
from minisweet.outputs import Outputs, read_outputs, write_outputs
from minisweet.run import load_run_tokenizer, read_record, read_validation
from minisweet.sweep import crossfit, spaced_thresholds, sweep
from minisweet.texts import Texts


@pytest.fixture
def copied(run_of, tmp_path):
    """A function that copies a finished run, which may be changed."""
    return lambda name: shutil.copytree(run_of(name), tmp_path / f"my {name}")


def test_folds_take_turns_and_each_is_decided_by_the_rule_of_the_others():
    logits = torch.randn(3, 103, 3, generator=torch.Generator().manual_seed(5)).mul(2).round()  # with many ties
    logits[0, :, 0] = 7  # the first exit predicts one class
    labels, keys, exits = torch.arange(103) % 3, torch.arange(103) * 7 % 103, Exits([1, 2, 4], 4, add_up=True)
    outputs = Outputs(logits, None, labels, keys, "accuracy", exits)
    thresholds, folds = spaced_thresholds(7, 1 / 3), crossfit(outputs)
    assert sorted(np.concatenate([rows for _, rows in folds])) == list(range(103))
    curve, taken = sweep(folds, outputs, thresholds)
    assert curve["exit_answers"] == [1, 3, 3]
    assert curve["exit_counts"] == [[(row == k).sum() for k in range(3)] for row in taken]
    assert curve["speedup_ratios"] == pytest.approx((np.cumsum([1, 2, 4]) / 4)[taken].mean(1).tolist())
    right = logits.argmax(-1).numpy()[taken, np.arange(103)] == labels.numpy()
    assert curve["scores"] == pytest.approx((100 * right.mean(1)).tolist())
    assert curve["area"] == area_under_curve(curve["speedup_ratios"], curve["scores"], 1 / 4)
    assert np.ptp([np.bincount(labels[rows], minlength=3) for _, rows in folds], axis=0).max() <= 1
    assert (outputs.take(np.arange(103)[::-1].copy()).folds(5) == outputs.folds(5)[::-1]).all()
    for rule, rows in folds:
        of_others = fit_rule(outputs.take(np.setdiff1d(np.arange(103), rows)))
        assert torch.equal(rule.temperatures, of_others.temperatures)
        confidence = rule.confidences(logits[:, rows])
        for i, threshold in enumerate(thresholds):
            assert taken[i, rows].tolist() == exits_taken(confidence, threshold, rule.lowest).tolist()
    assert len({tuple(rule.temperatures.tolist()) for rule, _ in folds}) == 5
    assert [rows.tolist() for _, rows in crossfit(outputs.take([7, 7, 7]))] == [[0, 1, 2]]  # a single text


@pytest.mark.parametrize("name", ["sweet", "lte"])
def test_an_evaluation_is_whole_and_the_same_again_and_what_is_saved_is_read(copied, command, monkeypatch, name):
    """Its logits are compared with those of single rows in test_use.py."""
    folder = copied(name)
    before = read_json(folder / "evaluation.json")
    (folder / "evaluation.json").write_text("{broken")
    drawn = []
    save = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(save, lambda figure, path, **_: drawn.append((figure.axes[0].lines, path.write_bytes(b"PNG"))))
    status, out, err = command(evaluate, folder)
    assert (status, err, (folder / "curve.png").read_bytes()) == (0, "", b"PNG")
    record, after = read_record(folder), read_json(folder / "evaluation.json")
    (((line,), _),) = drawn
    assert line.get_xydata().tolist() == list(map(list, zip(after["speedup_ratios"], after["scores"], strict=True)))
    assert {key for key in before if before[key] != after[key]} <= {"seconds", "device"}
    outputs, rows = read_outputs(folder / "logits.safetensors", record.id), read_validation(folder, record)
    assert (outputs.certainty is None, outputs.precision) == (name != "lte", "torch.float32")
    keys = Texts(load_run_tokenizer(folder, record), rows).keys.tolist()
    assert (outputs.labels.tolist(), outputs.keys.tolist()) == (rows.labels, keys)
    curve, _ = sweep(crossfit(outputs), outputs, after["thresholds"])
    assert curve.items() <= after.items()
    assert after["thresholds"] == spaced_thresholds(11, 0.0 if name == "lte" else 0.5)
    assert f"\n{1:9.3f}{after['scores'][-1]:8.1f}{after['speedup_ratios'][-1]:15.3f}" in out
    assert f"to answer new texts: python evaluate.py '{folder}' --predict" in out
    assert ("predicts one class for all rows" in out) == (1 in after["exit_answers"])


@pytest.mark.parametrize("name", ["sweet", "mm", "lte"])
def test_new_texts_are_answered_as_the_sweep_decides(copied, command, monkeypatch, name):
    monkeypatch.setattr(evaluate, "WINDOW", 60)
    folder = copied(name)
    record = read_record(folder)
    outputs, rows = read_outputs(folder / "logits.safetensors", record.id), read_validation(folder, record)
    rule = fit_rule(outputs)
    confidence = rule.confidences(outputs.logits, outputs.certainty)  # (K, N)
    sure = confidence[0].unique()
    quarter = len(sure) // 4
    widest = quarter + int(sure.diff()[quarter:-quarter].argmax())  # of the gaps that leave about half on each side
    threshold = float(sure[widest : widest + 2].mean())
    taken = outputs.decide([threshold], rule)[0]
    labels = outputs.logits.argmax(-1).numpy()[taken, np.arange(len(taken))]
    assert len({*taken}) > 1
    Path("new.tsv").write_text("note\tsentence\n" + "".join(f"\t{text}\n" for text in [*rows.first, " "]) + "\n")
    words = folder, "--predict", "new.tsv", "--threshold", threshold
    status, out, err = command(evaluate, *words)
    *found, space, blank = [line.split("\t") for line in out.splitlines()]
    assert (status, err, space) == (0, "", blank)
    assert [label for label, _, _ in found] == [record.labels[label] for label in labels]
    assert [int(layer) for _, _, layer in found] == np.array(record.exit_layers)[taken].tolist()
    expected = confidence.numpy()[taken, np.arange(len(taken))]
    np.testing.assert_allclose([float(value) for _, value, _ in found], expected, atol=2e-5)
    sharper = outputs._replace(logits=outputs.logits * torch.tensor([3.0, 1.0]), precision="torch.bfloat16")
    sharper = sharper if name != "lte" else sharper._replace(certainty=outputs.certainty**2)
    for unfit in (outputs._replace(exits=(*outputs.exits, 0)), sharper, None):
        write_outputs(folder / "logits.safetensors", unfit or outputs, record.id if unfit else "other")
        assert command(evaluate, *words) == (0, out, err)  # the validation rows are run again
    # Files without a header line, as of CoLA, and GLUE's file of new texts, which has one.
    write_json(folder / "run.json", read_json(folder / "run.json") | {"header": ["source", "mark", "sentence"]})
    assert command(evaluate, *words)[1] == out
    Path("new.tsv").write_text("a\t\tthe film\n")
    assert command(evaluate, *words)[1].count("\n") == 1
    monkeypatch.setattr("minisweet.exits.ExitHead.forward", lambda head, x: (x[:, :2] * np.nan, None))
    write_outputs(folder / "logits.safetensors", outputs, record.id)
    assert "new.tsv: the exits give infinite numbers or NaN" in command(evaluate, *words)[2]


def test_metric_and_precision_are_those_that_are_asked_for(copied, command, monkeypatch):
    folder = copied("sweet")
    write_json(folder / "run.json", read_json(folder / "run.json") | {"metric": "matthews"})
    before = read_outputs(folder / "logits.safetensors", read_record(folder).id)
    assert command(evaluate, folder, "--amp", "bf16", "--thresholds", 3)[0] == 0
    outputs = read_outputs(folder / "logits.safetensors", read_record(folder).id)
    after = evaluate.read_evaluation(folder)
    assert (after.metric, after.precision, outputs.precision) == ("matthews", *["torch.bfloat16"] * 2)
    assert after.thresholds == [0.5, 0.75, 1]
    assert not torch.equal(before.logits, outputs.logits)
    matthews = score(outputs.logits.argmax(-1).numpy(), outputs.labels.numpy(), "matthews")
    assert after.exit_scores == pytest.approx(matthews.tolist())
    monkeypatch.setattr("minisweet.exits.ExitHead.forward", lambda head, x: (x[:, :2] * np.nan, None))
    assert (command(evaluate, folder)[0], evaluate.read_evaluation(folder)) == (2, after)


def test_files_of_another_run_are_refused(copied, run_of, command):
    """Of model and logits this stands in test_deployed.py."""
    run = copied("sweet")
    (run / "model.safetensors").unlink()  # as in an archive of results
    assert command(evaluate, run, "--plot", "a.png")[0] == 0
    shutil.copy(run_of("ee") / "evaluation.json", run / "evaluation.json")
    _, _, err = command(evaluate, run, "--plot", "a.png")
    assert "evaluation.json: belongs to other weights than the model beside it" in err


def test_without_a_run_it_takes_the_newest_that_is_whole(copied, command, tmp_path):
    assert "no run of train.py here" in command(evaluate)[2]
    run = shutil.move(copied("ee"), tmp_path / "runs" / "newer")
    for name, time in (("older", 1e9), (".written", 1e10)):  # the other is being written
        path = shutil.copytree(run, tmp_path / "runs" / name) / "run.json"
        os.utime(path, (time, time))
    shutil.copytree(run, tmp_path / "runs" / "own")
    write_json(tmp_path / "runs" / "own" / "run.json", read_json(run / "run.json") | {"fit": {"head": "linear"}})
    assert command(evaluate)[1].startswith(f"{run.relative_to(tmp_path)}: ")
