"""What a user need not give."""

import pytest

from minisweet.branches import METHODS
from minisweet.runs.options import default_learning_rate, exit_layers_for


def test_every_depth_has_exit_layers():
    known = {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 6: (1, 2, 3, 6), 12: (1, 4, 6, 12), 24: (1, 6, 12, 24)}
    assert {depth: exit_layers_for(depth) for depth in known} == known
    for depth in range(1, 200):
        layers = exit_layers_for(depth)
        assert layers == tuple(sorted(set(layers)))
        assert (layers[0] >= 1, layers[-1]) == (True, depth)


@pytest.mark.parametrize("model", ["bert-base", "deberta-large", "minilm-l6", "./mine"])
def test_every_method_has_a_rate_and_branches_have_the_trunks(model):
    rates = {method: default_learning_rate(model, "mrpc", method) for method in METHODS}
    assert rates["branch"] == rates["mm"]
    if model == "bert-base":
        assert rates == pytest.approx({"ee": 5e-5, "mm": 3e-5, "sweet": 4e-5, "branch": 3e-5})
