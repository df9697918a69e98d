"""train.py's loop, without its command line."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from minisweet import MultiExitModel, load_encoder
from minisweet.branches import METHODS
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.sweep import predict
from minisweet.exits import EXIT_STRATEGIES, build_alone, exit_loss
from tests.conftest import exit_model, quick, write_model


def test_only_the_embeddings_of_words_that_occur_move(tmp_path, model_type):
    folder = write_model(tmp_path / "tiny", model_type)
    model = MultiExitModel(load_encoder(folder), (1, 4), 2, "ee")
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "train", Path()), np.arange(20))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train.train(model, examples, epochs=1, batch_size=4, learning_rate=1e-3, seed=0)
    after = model.state_dict()
    moved = (after["encoder.word_embeddings.weight"] != before["encoder.word_embeddings.weight"]).any(1)  # (V,)
    assert after.keys() == before.keys()
    assert moved.shape == (60,)
    assert 3 < moved.sum() < 60
    assert set(moved.nonzero()[:, 0].tolist()) <= set(examples.renumbered()[0].tolist())


def test_training_is_that_of_the_whole_table(tmp_path, model_type):
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder = write_model(tmp_path / "tiny", model_type, **changes)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "train", Path()), np.arange(40))
    torch.manual_seed(0)
    model = MultiExitModel(load_encoder(folder), (1, 4), 2, "ee")
    plain = copy.deepcopy(model).train()
    losses = train.train(model, examples, epochs=1, batch_size=8, learning_rate=1e-3, seed=0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for step, batch in enumerate(examples.shuffled(8, 0, 0)):
        optimizer.zero_grad()
        exits = [exit_loss(*answer, batch.targets) for answer in plain.exit_by_exit(*batch.inputs)]
        sum(exits).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 5)
        optimizer.step()
        assert losses[step] == pytest.approx(torch.stack(exits).tolist(), abs=1e-5)
    for name, parameter in plain.named_parameters():
        if name.endswith("query_key_value.bias"):
            continue  # a key's bias has no gradient but rounding, which AdamW makes a step of
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["sweet", "ee", "branch"])
def test_training_is_adamw_on_the_clipped_gradient_of_the_summed_loss(tmp_path, model_type, method):
    """Against a loop that holds the whole graph, clips by hand and uses another implementation of AdamW."""
    folder = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tokenizer = load_tokenizer(folder, 60, 16)
    examples = TokenizedExamples(tokenizer, load_examples("toy", "train", Path()), np.arange(24))
    torch.manual_seed(0)
    ours = exit_model(load_encoder(folder), (1, 2, 4), 2, method)
    for head in ours.heads:
        torch.nn.init.normal_(head.classifier.weight)  # so that clipping is needed
    plain = copy.deepcopy(ours)
    history = train.train(ours, examples, epochs=2, batch_size=8, learning_rate=1e-2, seed=5)

    groups = [list(plain.parameters())]
    if method == "branch":
        names = [("branches.0.", "heads.0."), ("branches.1.", "heads.1.")]
        groups = [[p for name, p in plain.named_parameters() if name.startswith(own)] for own in names]
    optimizer = torch.optim.AdamW(sum(groups, []), betas=(0.9, 0.999), weight_decay=0.0, foreach=False)
    step, norms = 0, []
    for epoch in range(2):
        for batch in examples.shuffled(8, 5, epoch):
            losses = [torch.nn.functional.cross_entropy(logits, batch.targets) for logits in plain(*batch.inputs)]
            losses = losses[:2] if method == "branch" else losses
            assert history[step] == pytest.approx([loss.item() for loss in losses], abs=1e-3)
            optimizer.zero_grad()
            sum(losses).backward()
            for group in groups:
                norms.append(torch.sqrt(sum(p.grad.square().sum() for p in group if p.grad is not None)))
                for parameter in group:
                    if parameter.grad is not None:
                        parameter.grad /= max(1.0, norms[-1])
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)
            optimizer.step()
            step += 1
    assert step == len(history) == 6
    assert max(norms) > 1.2
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # A key bias has no gradient but rounding, and Adam makes full steps of it.
        if "query_key_value.bias" not in name:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
def test_training_branches_leaves_the_trunk_as_it_is_and_without_dropout(tmp_path, model_type, strategy):
    folder = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.3)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "train", Path()), np.arange(20))
    model = exit_model(load_encoder(folder), (1, 3, 4), 2, "branch", strategy).eval()
    before, modes = {name: tensor.clone() for name, tensor in model.state_dict().items()}, set()
    for name, module in model.named_modules():
        if name.endswith(("output", "classifier", "embedding_norm")):
            module.register_forward_hook(lambda module, *_, n=name: modes.add((n, module.training)))
    history = train.train(model, examples, epochs=1, batch_size=4, learning_rate=1e-2, seed=0)
    assert np.shape(history) == (5, 2)
    for name, tensor in model.state_dict().items():
        trained = name.startswith(("branches.", "heads.0.", "heads.1."))
        assert torch.equal(tensor, before[name]) is not trained, name
    branches = {(f"branches.{k}.{part}output", True) for k in (0, 1) for part in ("", "attention_")}
    trunk = {(f"encoder.layers.{n}.{part}output", False) for n in (0, 1) for part in ("", "attention_")}
    heads = {(f"heads.{k}.classifier", True) for k in (0, 1)}
    assert modes == branches | trunk | heads | {("encoder.embedding_norm", False)}  # layers 3 and 4 were not run


def test_a_branch_trains_as_if_it_were_alone(tmp_path, model_type):
    """To the bit: no other branch's gradient, and no other's norm in the clipping, meets its own."""
    folder = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "train", Path()), np.arange(20))
    torch.manual_seed(0)
    together = exit_model(load_encoder(folder), (1, 2, 4), 2, "branch")
    for head in together.heads:
        torch.nn.init.normal_(head.classifier.weight)  # so that clipping is needed
    alone = copy.deepcopy(together).keep_exits((2, 4))
    settings = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    both, one = (train.train(model, examples, **settings) for model in (together, alone))
    assert [row[1:] for row in both] == one
    for ours, theirs in ((together.branches[1], alone.branches[0]), (together.heads[1], alone.heads[0])):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.mark.parametrize("method", ["branch", "sweet"])
def test_the_trunks_probabilities_are_targets(tmp_path, method):
    folder = write_model(tmp_path / "tiny", "bert", hidden_dropout_prob=0.3)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "train", Path()), np.arange(30))
    trunk = build_alone(folder, 4, 2).train()
    torch.nn.init.normal_(trunk.heads[0].classifier.weight)
    own = train.trunk_targets(trunk, examples, None, "trunk")
    with torch.no_grad():
        logits = torch.cat([trunk.eval()(*examples.batch(np.array([row])).inputs)[0] for row in range(30)])
    assert own.std(0).min() > 0.01
    np.testing.assert_allclose(own, logits.softmax(-1), atol=1e-5)
    half = train.trunk_targets(trunk, examples, None, "half")
    np.testing.assert_allclose(half, (own + np.eye(2)[examples.labels]) / 2, atol=1e-6)
    model = exit_model(load_encoder(folder), (1, 4), 2, method)
    batch = examples.with_targets(own).batch(np.array([3, 7, 1]))
    losses = train.send_back(model.eval(), batch, torch.amp.GradScaler("cpu", enabled=False))
    ours = model(*batch.inputs).log_softmax(-1)
    expected = -(torch.from_numpy(own[[3, 7, 1]]) * ours).sum(-1).mean(1)
    torch.testing.assert_close(losses, expected[: len(losses)].detach(), atol=1e-5, rtol=1e-5)


def test_predict_answers_in_the_order_of_the_examples(tmp_path, model_type):
    folder = write_model(tmp_path / "tiny", model_type)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "dev", Path()), np.arange(90))
    assert len(set(examples.lengths)) > 3
    model = MultiExitModel(load_encoder(folder), (1, 4), 2).eval()
    logits, _ = predict(model, examples, None)
    with torch.no_grad():
        single = torch.cat([model(*examples.batch(np.array([row])).inputs) for row in range(90)], dim=1)
    torch.testing.assert_close(logits, single, atol=1e-5, rtol=0)


def test_float16_gradients_are_unscaled_before_they_are_clipped_and_training_has_dropout(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "tiny", "bert")
    examples = TokenizedExamples(load_tokenizer(folder, 60, 16), load_examples("toy", "train", Path()), np.arange(16))
    norms = {}
    clip = train.clip_grad_norm_
    for precision in (None, torch.float16):
        seen = norms.setdefault(precision, [])
        monkeypatch.setattr(
            train, "clip_grad_norm_", lambda parameters, limit, seen=seen: seen.append(clip(parameters, limit))
        )
        torch.manual_seed(0)
        model = MultiExitModel(load_encoder(folder), (1, 4), 2).eval()
        training = []
        model.encoder.layers[3].output.register_forward_pre_hook(
            lambda module, _, seen=training: seen.append(module.training)
        )
        train.train(model, examples, epochs=1, batch_size=16, learning_rate=1e-3, seed=0, precision=precision)
        assert training == [True]
    assert norms[torch.float16][0].item() == pytest.approx(norms[None][0].item(), rel=0.05)


def test_after_an_error_the_whole_table_of_words_is_back(tmp_path):
    folder = write_model(tmp_path / "tiny", "bert")
    model = MultiExitModel(load_encoder(folder), (1, 4), 2)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "train", Path()), np.arange(9))
    embedding = model.encoder.word_embeddings
    whole, old = embedding.weight, embedding.weight.detach().clone()
    used, renumbered = examples.renumbered()
    for ids, new in zip(examples.ids, renumbered.ids, strict=True):
        assert used[new].tolist() == ids.tolist()
    assert used[renumbered.pad_id] == examples.pad_id

    def fail():
        with train.used_rows(model, examples) as within:
            assert embedding.weight.shape == (len(used), 16)
            assert torch.equal(embedding.weight, old[used])
            assert within.ids[0].tolist() == renumbered.ids[0].tolist()
            embedding.weight.data.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert embedding.weight is whole
    old[used] = 0
    assert torch.equal(whole, old)


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
def test_balanced_rows_count_by_their_class(strategy):
    logits, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    certainty = torch.rand(8) if strategy == "lte" else None
    examples = SimpleNamespace(targets=labels.numpy(), labels=labels.numpy(), with_targets=torch.from_numpy)
    targets = train.balanced(examples, 3)
    sure = [None] * 8 if certainty is None else certainty[:, None]
    of_rows = torch.stack([exit_loss(logits[[i]], sure[i], labels[[i]]) for i in range(8)])
    weights = torch.tensor([8 / (3 * n) for n in (5, 5, 5, 5, 5, 2, 2, 1)])
    torch.testing.assert_close(exit_loss(logits, certainty, targets), (weights * of_rows).mean())
    soft = torch.randn(8, 3).softmax(-1)  # as of a trunk; without labels its answers are the classes
    examples.targets, examples.labels, answers = soft.numpy(), None, soft.argmax(-1)
    counts = answers.bincount(minlength=3)
    weights = 8 / (counts.count_nonzero() * counts[answers])
    torch.testing.assert_close(train.balanced(examples, 3), soft * weights[:, None])


@pytest.mark.parametrize("method", METHODS)
def test_class_weights_change_the_training_and_are_recorded(command, tmp_path, method):
    model = write_model(tmp_path / "tiny", "bert")
    rows = ["a good film,up\n"] * 2 + [f"a bad film {i},down\n" for i in range(28)]
    Path("t.csv").write_text("text,label\n" + "".join(rows))
    losses = {}
    for weights in ([], ["--class-weights", "balanced"]):
        arguments = ["--data", "t.csv", "--dev-data", "t.csv", "--model", model, "--method", method, "--lr", "1e-3"]
        status, _, err = command(train, *quick(model, *arguments, *weights, "--out", "run", "--overwrite"))
        assert status == 0, err
        record = json.loads(Path("run/run.json").read_text())
        assert record["arguments"]["class_weights"] == ("balanced" if weights else None)
        losses[bool(weights)] = record["losses"]
    assert losses[True] != losses[False]
