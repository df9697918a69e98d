"""Our dropout is dropout."""

import pytest
import torch

from minisweet.layers import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_dropped_one_by_one_and_the_others_scaled(dtype, p):
    torch.manual_seed(0)
    x = torch.ones(1001, 103, dtype=dtype, requires_grad=True)  # no multiple of the four numbers of a draw
    y = Dropout(p).train()(x)
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.005)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - round(p * 65536) / 65536), dtype=dtype).item()}
    centred = dropped - p
    for dim, shift in ((0, 1), (1, 1), (1, 4)):  # neighbours know nothing of each other, nor do draws
        correlation = (centred * centred.roll(shift, dim)).mean() / (p * (1 - p))
        assert abs(correlation) < 0.015
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_evaluation_and_p_0_change_nothing_and_the_seed_decides():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5).train()(torch.ones(50)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
