"""How `minisweet fit` trains: what a trunk keeps, what model and bag learn, and for how long."""

import math
import re
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minisweet import EarlyExitClassifier, load_encoder
from minisweet.base.files import read_json
from minisweet.classifier import training
from minisweet.classifier.cascade import run_all
from minisweet.classifier.main import choose, fit
from minisweet.classifier.main import test as check
from minisweet.classifier.probe import FullModel, load_classifier
from minisweet.classifier.promise import Goal, most_lost
from minisweet.classifier.run import load_model, read_record
from minisweet.classifier.split import CHOOSING
from minisweet.classifier.training import EPOCHS, EPOCHS_AGAIN, STEPS
from minisweet.defaults import default_epochs
from tests import conftest
from tests.conftest import OWN, opinions, random_batch, write_classifier, write_model, write_rows


@pytest.fixture
def fitted(command):
    """Run `minisweet fit` on 300 rows of random words in own.csv, or on other files, with a tiny model."""
    write_model(Path("tiny"), "bert", hidden_dropout_prob=0.3)
    for name in ("own", "other"):
        conftest.write_table(Path(f"{name}.csv"), ["text", "label"], {"label": ["negative", "positive"]})

    def run_and_read(*arguments, file=("own.csv",)) -> str:
        model = [] if "--trunk" in arguments else ["--model", "tiny", "--epochs", 1, "--lr", "1e-3"]
        status, out, err = command(fit, *file, *model, "--batch-size", 512, "--max-length", 32, *arguments)
        assert status == 0, err
        return out + err

    return run_and_read


def test_a_trunk_stays_as_it_is_and_a_new_bag_learns_labels_or_what_it_answers(fitted, monkeypatch):
    """The trunk, from pickled weights, answers without dropout."""
    torch.save(load_file("tiny/model.safetensors"), "tiny/pytorch_model.bin")
    Path("tiny/model.safetensors").unlink()
    fitted("--out", "trunk", file=["other.csv"])
    model, seen, call = EarlyExitClassifier.load("trunk").cascade.model, [], training.fit_ngrams
    monkeypatch.setattr(training, "fit_ngrams", lambda *given: seen.append(given) or call(*given))
    told = "no layer is trained: the trunk stays as it is, but its bag of words no longer adds to its answers\n"
    assert told in fitted("--trunk", "trunk", "--out", "labels")
    fitted("--trunk", "trunk", "--out", "answers", file=["--unlabelled", "own.csv"])
    (_, _, of_labels, _), (_, inputs, of_answers, _) = seen
    assert (len(of_labels), of_labels.unique().tolist()) == (240, [0, 1])
    with torch.no_grad():
        answers = torch.cat([model(ids, mask, ids * 0).softmax(-1) for ids, mask in inputs])
    torch.testing.assert_close(of_answers, answers, atol=1e-5, rtol=1e-5)
    trunk, *records = (read_record(Path(name)) for name in ("trunk", "labels", "answers"))
    for record in records:
        assert (record.losses, record.labels) == ({}, ["negative", "positive"])
        assert {*trunk.trained_keys} < {*record.trained_keys}


def test_epochs_follow_from_what_is_learned(command, monkeypatch):
    """Labels, and then the model's answers to other texts, which are more than the labels."""
    write_model(Path("tiny"), "bert")
    for name in ("own", "more", "most"):
        conftest.write_table(Path(f"{name}.csv"), ["text", "label"], {"label": ["a", "b", "c"]})
    monkeypatch.setattr(training, "MOST_AGAIN", 400)
    stages, options = [], "--model tiny --max-length 32 --batch-size 4 --out run".split()

    def record(model, texts, targets, epochs: int, options, title: str) -> list:
        stages.append((title, epochs * -(-len(texts) // options.batch_size)))
        return []

    monkeypatch.setattr(training, "fine_tune", record)
    status, _, err = command(fit, *"own.csv --unlabelled more.csv --unlabelled most.csv".split(), *options)
    assert status == 0, err
    labels, answers = default_epochs(EPOCHS, STEPS, 240, 4) * 60, EPOCHS_AGAIN * 160  # 240 of 300, 400 of 600 others
    assert stages == [("fine-tuning", labels), ("learning from its own answers", answers)]


# On a model of words, with what it makes of opinions.


def test_layers_learn_from_unlabelled_texts_where_few_are_labelled(own_run, command, monkeypatch):
    """The probe starts from public weights. Where texts without labels are more than the labels, the model is heard."""
    embedded, learned, tune, answer = [], [], training.fine_tune, training.answer_all
    modes, bags, fit_bag, probe = [], [], training.fit_ngrams, training.fit_probe

    def probed(head, vectors, labels) -> None:
        embedded.append((vectors, labels))
        probe(head, vectors, labels)

    def tuned(model, texts, targets, *settings) -> list:
        learned.append((model.head.weight.detach().clone(), texts, targets))
        return tune(model, texts, targets, *settings)

    monkeypatch.setattr(training, "fit_probe", probed)
    monkeypatch.setattr(training, "fine_tune", tuned)
    monkeypatch.setattr(training, "answer_all", lambda *given: (answer(*given), modes.append(given[0].training))[0])
    monkeypatch.setattr(training, "fit_ngrams", lambda *given: bags.append(given[3]) or fit_bag(*given))
    write_rows(Path("few.csv"), [[text] for text, _ in opinions(400)[300:]], "text")
    Path("half.jsonl").write_text('{"text": "the film is you", "label": [1]}\n' * 2)  # labels are not read
    folder = own_run.parent
    options = [folder / "own.csv", *OWN[2:], "--model", folder / "tiny", "--out", "run"]
    for files, counts, stages in (
        (
            [folder / "more.csv", "half.jsonl"],
            "401 to learn from, 100 to judge, 28 left out\n",
            {"fine-tuning": 240, "learning from its own answers": 240 + 401},
        ),
        (["few.csv"], "80 to learn from, 20 to judge", {"fine-tuning": 240}),
    ):
        more = [word for file in files for word in ("--unlabelled", file)]
        status, _, err = command(fit, *options, *more, "--overwrite")
        assert (status, f"unlabelled texts: {counts}" in err) == (0, True), err
        steps = {stage: len(losses) for stage, losses in read_json(Path("run/run.json"))["losses"].items()}
        assert steps == {stage: 2 * -(-rows // 16) for stage, rows in stages.items()}
    assert (read_json(Path("run/config.json"))["pooling"], {*modes}) == ("mean", {False})  # answers without dropout
    public = load_encoder(folder / "tiny", pooling="mean")
    assert all(torch.equal(given, public.word_embeddings.weight) for given in bags)  # not those that were trained
    (start, known, _), (_, _, targets), (same, _, _) = learned
    model = FullModel(public, torch.nn.Linear(16, 2))
    vectors = run_all(lambda *inputs: F.normalize(model.pooled(*inputs)), known, torch.device("cpu"))
    for found, labels in embedded:
        torch.testing.assert_close(found, vectors, rtol=0, atol=0)
        assert labels.tolist() == known.labels.tolist()
    assert (len(known), (known.labels >= 0).all()) == (240, True)
    assert torch.equal(start, same)
    assert start.abs().max() > 0.1  # as the regression has it
    np.testing.assert_array_equal(targets[:240], np.eye(2)[known.labels])
    assert targets[240:].sum(1) == pytest.approx(1)


def test_a_finished_classifier_gets_an_exit_without_any_label(own_run, command):
    """A run of fit, with texts as long, or a classifier that was trained elsewhere. It stays as it is."""
    options = ["--unlabelled", own_run.parent / "more.csv", "--out", "run", "--amp", "off"]
    theirs = write_classifier(Path("theirs"))
    for trunk, labels, length in (
        (own_run, ["down", "up"], []),
        (theirs, ["LABEL_0", "LABEL_1"], OWN[2:4]),
    ):
        status, out, err = command(fit, "--trunk", trunk, *options, *length, "--overwrite")
        assert (status, "agreement with full depth" in out) == (0, True), err
        run = EarlyExitClassifier.load("run")
        assert (run.cascade.labels, run.record.arguments["max_length"]) == (labels, 32)
        point = run.operating_point
        assert (point.labelled_judges, point.full_depth, point.weights) == (0, 100.0, [0, 0])
        model = load_classifier(trunk)[0] if trunk is theirs else load_model(trunk, read_record(trunk))
        torch.testing.assert_close(run.cascade.model(*random_batch()), model(*random_batch()), rtol=0, atol=0)


def test_before_it_trains_fit_says_what_it_knows_and_a_log_has_a_line_per_epoch(fitted):
    """In a log, which is no terminal. Few judges cannot promise anything."""
    told = fitted("--out", "a", "--max-lost", 20, "--sure", 80, "--epochs", 2)
    may_lose = most_lost(45, Goal(max_lost=20, sure=80))
    assert f"45 texts will judge, of which early exit may lose {may_lose}\ntraining takes about 0." in told
    epochs = re.findall(r"^fine-tuning: epoch (\d) of 2, loss \d\.\d{3}, 0\.\d minutes left$", told, re.MULTILINE)
    assert epochs == ["1", "2"]
    told = fitted("--out", "b")
    few = "45 texts will judge, so nothing faster than full depth can be promised: it takes about 510 labelled rows"
    assert told.index(few) < told.index("fine-tuning: 1 epochs")


def test_groups_stay_together_in_all_files_and_judge_by_one_text(own_run, command):
    """Of 200 threads 100 have labelled texts, and all have others."""
    folder, thread_of = own_run.parent, {text: f"thread {n % 200}" for n, (text, _) in enumerate(opinions(1000))}
    rows = [(*row, thread_of[row[0]]) for n, row in enumerate(opinions(500)) if n % 200 < 100]
    more = [(text, thread_of[text]) for text, _ in opinions(1000)[500:]]
    write_rows(Path("own.csv"), rows, "text", "label", "thread")
    write_rows(Path("more.csv"), more, "text", "thread")
    options = ["own.csv", *OWN[2:], "--model", folder / "tiny", "--out", "run", "--dev-size", 0.3, "--unlabelled"]
    assert "no column thread; it has" in command(fit, *options, folder / "more.csv", "--group-column", "thread")[2]
    status, _, err = command(fit, *options, "more.csv", "--group-column", "thread")
    assert status == 0, err
    run = EarlyExitClassifier.load("run")
    side, point = run.validation.texts, run.operating_point
    is_labelled, threads = side.labels >= 0, np.array([thread_of[text] for text in side.examples.first])
    assert side.examples.groups == threads.tolist()
    aside = {*threads[is_labelled]}, {*threads[~is_labelled]}
    assert (len(aside[0]), len(aside[1])) == (30, 20)
    apart = sum(thread in aside[0] for _, thread in more)
    assert f"to judge, {apart} left out\n" in err
    learnt = [text for text, *_, thread in rows + more if thread not in aside[0] | aside[1]]
    assert set(run.record.trained_keys) == {*run.cascade.tokenize(learnt).keys.tolist()}
    assert point.judging_texts == 30 + 20 - math.ceil(30 / CHOOSING) - 20 // CHOOSING
    # So it is in Python, and of a run that is read again, for whose choice the texts are asked anew.
    options = {name: run.record.arguments[name] for name in "model max_length amp epochs lr".split()}
    (texts, labels, groups), (others, of_others) = zip(*rows, strict=True), zip(*more, strict=True)
    ours = EarlyExitClassifier(**options, dev_size=0.3)
    ours.fit(texts, labels, groups=groups, unlabelled=others, unlabelled_groups=of_others)
    assert ours.operating_point == point  # the weights too, of which its id is a hash
    assert command(choose, "run", "--amp", "bf16")[0] == 0
    assert EarlyExitClassifier.load("run").validation.roles.tolist() == run.validation.roles.tolist()
    new = [(text, label, f"new {n % 10}") for n, (text, label) in enumerate(opinions(1030)[1000:])]
    learned = next(thread for *_, thread in rows if thread not in aside[0])
    new += [("awful film you saw", "down", learned), ("fine film you saw", "up", min(aside[0]))]
    new += [("bad film you saw", "down", min(aside[1]))]
    write_rows(Path("new.csv"), new, "text", "label", "thread")
    _, out, _ = command(check, "run", "new.csv")
    told = "10 of 33 rows count; left out: 1 in groups that were trained on, 2 in groups of validation rows, "
    assert f"new.csv: {told}20 in a group for which another row stands\n\n10 rows, threshold" in out
    texts, labels, groups = zip(*new, strict=True)
    assert [ours.test(texts, labels, groups=some)["judging_texts"] for some in (groups, None)] == [10, 33]
    # What the trunk has learned from does not judge either, whoever learns from it now.
    threads = sorted({thread for *_, thread in rows} - aside[0]) + [f"new {n}" for n in range(70)]
    thread_of = dict(zip(map(itemgetter(0), opinions(1140)[1000:]), threads, strict=True))
    write_rows(Path("new.csv"), [*thread_of.items()], "text", "thread")
    options = ["--trunk", "run", "--unlabelled", "new.csv", "--group-column", "thread", "--out", "again"]
    assert command(fit, *options)[0] == 0
    again = EarlyExitClassifier.load("again")
    groups = again.validation.texts.examples.groups
    assert 0 < len(groups) < 28
    assert all(group.startswith("new") for group in groups)
    assert again.operating_point.judging_texts == len(groups) - math.ceil(len(groups) / CHOOSING)
