"""The encoders: precision, padding, dropout. Parity at large is in test_paper.py."""

import pytest
import torch

from minisweet import MultiExitModel
from minisweet.dropout import Dropout
from minisweet.hub import home
from tests.conftest import note_difference, random_batch, tiny_encoder
from tests.references.__main__ import differences


def test_hidden_states_of_the_public_mpnet_are_those_of_transformers():
    """Where its weights are at hand; with distances beyond the last bucket."""
    pytest.importorskip("transformers")
    folder = home() / "weights" / "mpnet-base"
    if not folder.exists():
        pytest.skip("mpnet-base is not at hand")
    of_states, of_gradients = map(torch.tensor, differences(folder))
    assert (of_states < 5e-5, of_gradients < 1e-4) == (True, True)
    note_difference("hidden states of the public MPNet, beside transformers", of_states, torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_models_stay_close_and_train_and_padding_changes_no_token(model_type, dtype):
    encoder, batch = tiny_encoder(model_type, scale=0.1).eval(), random_batch(1)
    batch[1][1] = 0  # a row of padding alone
    exact, real = encoder(*batch)[-1], batch[1] == 1
    with torch.autocast("cpu", dtype=dtype):
        cast = encoder(*batch)[-1].float()
        padded = encoder(*(torch.nn.functional.pad(x, (0, 6)) for x in batch))[-1][:, :11].float()
        cast[real].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    assert torch.cat([exact, cast]).isfinite().all()
    rounding = (cast - exact)[real].abs().max()
    limit = 32 * torch.finfo(dtype).eps  # a few roundings of numbers of size 1 to 4
    assert 0 < rounding < limit
    assert (padded - cast)[real].abs().max() <= 2 * rounding
    half = encoder.to(dtype)(*batch)[-1].float()
    assert ((half - exact)[real].abs().max() < limit, half.isfinite().all()) == (True, True)


def test_dropout_is_where_the_models_have_it(model_type):
    """A dropout with a probability of 1, if only by rounding, does what zeros in place of some weights do."""
    assert tiny_encoder(model_type, hidden_dropout_prob=0.3).config.head_dropout == 0.3  # where it has none of its own
    silenced = {
        "attention_probs_dropout_prob": ["attention_output.weight"],
        "hidden_dropout_prob": ["embedding_norm.", "attention_output.", ".output.", "relative_table."],
    }
    if model_type == "mpnet":  # its heads have no rates of their own
        silenced["hidden_dropout_prob"] += ["pooler.weight", "classifier.weight"]
    if model_type == "bert":
        silenced["classifier_dropout"] = ["classifier.weight"]
    if model_type == "deberta":
        silenced |= {"cls_dropout": ["classifier.weight"], "pooler_dropout": ["pooler.weight"]}
    for key, silent in silenced.items():
        rates = dict.fromkeys(silenced, 0.0) | {key: 1 - 1e-9}
        model = MultiExitModel(tiny_encoder(model_type, **rates), (1, 4), 2, exit_strategy="lte")
        in_training = model.train()(*random_batch())
        for name, parameter in model.named_parameters():
            if any(part in name for part in silent):
                parameter.data.zero_()
        torch.testing.assert_close(in_training, model.eval()(*random_batch()))


def test_dropout_meets_debertas_positions_too():
    """What it does there is hidden where dropout leaves nothing of what attention says."""
    encoder = tiny_encoder("deberta", hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0)
    layer, hidden = encoder.layers[0].train(), torch.randn(4, 11, 16)
    bias, positions = encoder.context(torch.ones(4, 11))
    attended = layer.attend(hidden, (bias, positions))
    torch.testing.assert_close(attended, layer.attend(hidden, (bias, 0 * positions)))
    assert (attended - layer.eval().attend(hidden, (bias, positions))).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_elements_are_dropped_one_by_one_and_the_others_scaled(dtype):
    torch.manual_seed(0)
    p, x = 0.1, torch.ones(1001, 103, dtype=dtype, requires_grad=True)  # no multiple of the four numbers of a draw
    y = Dropout(p).train()(x)
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.005)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - round(p * 65536) / 65536), dtype=dtype).item()}
    for shift in (1, 4):  # neighbours know nothing of each other, nor do draws
        both = (dropped * dropped.roll(shift, 1)).mean().item()
        assert both == pytest.approx(p * p, abs=0.0015)
    nothing = Dropout(1 - 1e-9).train()(x)  # a few elements in 65,536 would pass
    (y + nothing).sum().backward()
    assert nothing.count_nonzero() == 0
    torch.testing.assert_close(x.grad, y.detach())
