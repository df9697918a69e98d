"""What a CPU cannot show, for whoever has a GPU: python -m pytest -m gpu."""

import pytest
import torch

import train
from minisweet.confidence import confidence, exits_taken
from minisweet.exits import METHODS
from minisweet.fast import used_rows
from minisweet.inference import early_exit
from tests import conftest
from tests.conftest import (
    NO_DROPOUT,
    answers_of,
    random_batch,
    tiny_encoder,
    toy_examples,
    undecided_models,
    write_model,
)

DEVICE = "cuda"
PRECISIONS = [torch.bfloat16, torch.float16, None]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["ee", "sweet", "mm"])
def test_training_falls_in_loss_and_its_gradients_are_finite(tmp_path, monkeypatch, method, precision):
    """With dropout and, in float16, with the scaler, which may leave out a step or two until it has found its scale."""
    folder, norms, clip = conftest.write_model_of_words(tmp_path / "tiny"), [], train.clip_grad_norm_
    conftest.reconfigure(folder, "bert")  # with dropout again
    monkeypatch.setattr(train, "clip_grad_norm_", lambda group, limit: norms.append(clip(group, limit)))
    examples, settings = toy_examples(folder, range(200)), {"epochs": 8, "batch_size": 16, "lr": 3e-3}
    for model in conftest.models_of(folder, method):
        norms.clear()
        with used_rows(model.encoder.word_embeddings, examples) as few:
            losses = train.fine_tune(model, few, **settings, device=DEVICE, precision=precision)
        losses = torch.tensor(losses)  # (steps, K)
        assert (losses[-20:].mean(0) < losses[:10].mean(0) - 0.02).all()
        assert sum(not norm.isfinite() for norm in norms) <= (4 if precision is torch.float16 else 0)
        assert norms[-1].isfinite()
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_live_early_exit_decides_as_the_sweep(tmp_path, model_type, method, precision):
    """But for confidences within rounding of the threshold."""
    models = [model.to(DEVICE) for model in undecided_models(write_model(tmp_path, model_type), method)]
    batch, rounding = [x.to(DEVICE) for x in random_batch(3, batch=64)], 3e-2 if precision else 1e-4
    with torch.no_grad(), torch.autocast(DEVICE, precision, enabled=precision is not None):
        answers, asked, none = answers_of(models, batch), 0, [[1.0]] * 3
        sure = torch.stack([confidence("confidence", answer, [1.0]) for answer in answers])
        predictions = torch.stack([answer.logits.argmax(-1) for answer in answers])
        for threshold in (0.5, 0.6, 0.75, 0.9, 1.0):
            live, swept = early_exit(models, *batch, threshold, none), exits_taken(sure, threshold)
            clear = ((sure - threshold).abs() > rounding).all(0) | (threshold in (0.5, 1.0))
            assert torch.equal(live.exits[clear], swept[clear])
            taken = swept, torch.arange(64, device=DEVICE)
            torch.testing.assert_close(live.confidence[clear], sure[taken][clear], atol=10 * rounding, rtol=0)
            settled = clear & (sure[taken] > 0.5 + rounding)
            assert torch.equal(live.labels[settled], predictions[taken][settled])
            asked += int(clear.sum())
    assert asked > 200  # of 320


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_torchs_attention_trains_as_the_plain_products_do(model_type):
    found = []
    for device in ("cpu", DEVICE):  # plain products are a CPU's
        encoder = tiny_encoder(model_type, **NO_DROPOUT).to(device).train()
        ids, mask, types = (x.to(device) for x in random_batch())
        output = encoder.layers[0](encoder.embed(ids, types), encoder.context(mask))[mask == 1]
        output.square().sum().backward()
        gradients = {name: p.grad.cpu() for name, p in encoder.named_parameters() if p.grad is not None}
        found.append(gradients | {"output": output.detach().cpu()})
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


def test_torchs_attention_drops_weights_of_attention():
    layer = tiny_encoder("bert", attention_probs_dropout_prob=0.5).to(DEVICE).layers[0].train()
    hidden = torch.randn(1, 11, 16, device=DEVICE)
    context = (torch.zeros(1, 1, 1, 11, device=DEVICE),)
    with torch.no_grad():
        many = layer.attend(hidden.expand(5000, -1, -1), context)
        assert not torch.equal(many[0], many[1])
        torch.testing.assert_close(many.mean(0), layer.eval().attend(hidden, context)[0], atol=0.05, rtol=0.05)
