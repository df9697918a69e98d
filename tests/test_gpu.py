"""What a CPU cannot show, for whoever has a GPU: python -m pytest -m gpu."""

import pytest
import torch

from minisweet import training
from minisweet.adaptive import ExitRule, exits_taken
from minisweet.live import early_exit
from minisweet.methods import METHODS
from tests import conftest
from tests.conftest import NO_DROPOUT, random_batch, tiny_encoder, toy_examples, undecided_model, write_model

DEVICE = "cuda"
PRECISIONS = [torch.bfloat16, torch.float16, None]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", ["ee", "sweet", "mm"])
def test_training_falls_in_loss_and_its_gradients_are_finite(tmp_path, monkeypatch, method, precision):
    """With dropout and, in float16, with the scaler, which may leave out a step or two until it has found its scale."""
    folder, norms, clip = conftest.write_model_of_words(tmp_path / "tiny"), [], training.clip_grad_norm_
    conftest.reconfigure(folder, "bert")  # with dropout again
    monkeypatch.setattr(training, "clip_grad_norm_", lambda group, limit: norms.append(clip(group, limit)))
    examples, model = toy_examples(folder, range(200)), conftest.model_of(folder, method).to(DEVICE)
    for part in model.models_alone:
        norms.clear()
        losses = training.fine_tune(part, examples, 8, 16, 3e-3, device=DEVICE, precision=precision)
        losses = torch.tensor(losses)  # (steps, K)
        assert (losses[-20:].mean(0) < losses[:10].mean(0) - 0.02).all()
        assert sum(not norm.isfinite() for norm in norms) <= (4 if precision is torch.float16 else 0)
        assert norms[-1].isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_live_early_exit_decides_as_the_sweep(tmp_path, model_type, method, precision):
    """But for confidences within rounding of the threshold."""
    model = undecided_model(write_model(tmp_path, model_type), method).to(DEVICE)
    batch, rounding = [x.to(DEVICE) for x in random_batch(3, batch=64)], 3e-2 if precision else 1e-4
    with torch.no_grad(), torch.autocast(DEVICE, precision, enabled=precision is not None):
        logits = model(*batch).float()
        confidence, asked = ExitRule(2).confidences(logits), 0
        for threshold in (0.5, 0.6, 0.75, 0.9, 1.0):
            live, swept = early_exit(model, *batch, threshold), exits_taken(confidence, threshold, 0.5)
            clear = ((confidence - threshold).abs() > rounding).all(0) | (threshold in (0.5, 1.0))
            assert torch.equal(live.exits[clear], swept[clear])
            own = logits[swept, torch.arange(64)]
            torch.testing.assert_close(live.logits[clear], own[clear], atol=10 * rounding, rtol=10 * rounding)
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
