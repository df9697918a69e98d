"""train.py's loop, without its command line."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from minisweet import MultiExitModel, load_encoder
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.sweep import predict
from minisweet.exits import exit_loss
from tests.conftest import write_model


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


@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_training_is_adamw_on_the_clipped_gradient_of_the_summed_loss(tmp_path, model_type, method):
    """Against a loop that holds the whole graph, clips by hand and uses another implementation of AdamW."""
    folder = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tokenizer = load_tokenizer(folder, 60, 16)
    examples = TokenizedExamples(tokenizer, load_examples("toy", "train", Path()), np.arange(24))
    torch.manual_seed(0)
    ours = MultiExitModel(load_encoder(folder), (1, 2, 4), 2, method)
    plain = copy.deepcopy(ours)
    history = train.train(ours, examples, epochs=2, batch_size=8, learning_rate=1e-2, seed=5)

    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.999), weight_decay=0.0, foreach=False)
    step, norms = 0, []
    for epoch in range(2):
        for batch in examples.shuffled(8, 5, epoch):
            losses = [torch.nn.functional.cross_entropy(logits, batch.targets) for logits in plain(*batch.inputs)]
            assert history[step] == pytest.approx([loss.item() for loss in losses], abs=1e-3)
            optimizer.zero_grad()
            sum(losses).backward()
            norm = torch.sqrt(sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None))
            norms.append(norm)
            for parameter in plain.parameters():
                if parameter.grad is not None:
                    parameter.grad /= max(1.0, norm)
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)
            optimizer.step()
            step += 1
    assert step == len(history) == 6
    assert max(norms) > 1.2  # so that clipping is seen
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # A key bias has no gradient but rounding, and Adam makes full steps of it.
        if "query_key_value.bias" not in name:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


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
