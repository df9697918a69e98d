"""The operating point: the threshold to deploy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.adaptive import ExitRule, exit_costs, exits_taken
from minisweet.evaluation.metrics import score
from minisweet.evaluation.sweep import Candidates, Validation, candidates, choose, operating_point


def random_validation(seed: int, K: int, N: int, C: int) -> Validation:
    """Logits with many ties, so that confidences coincide."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(K, N, C, generator=generator) * 2).round()
    return Validation(logits, None, torch.randint(0, C, (N,), generator=generator))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    K=st.integers(1, 4),
    N=st.integers(1, 30),
    C=st.integers(2, 4),
    method=st.sampled_from(["sweet", "mm", "branch"]),
    metric=st.sampled_from(["accuracy", "matthews"]),
)
def test_every_candidate_gives_what_the_sweep_gives(seed, K, N, C, method, metric):
    validation, exit_layers, rule = random_validation(seed, K, N, C), tuple(range(1, K + 1)), ExitRule(C)
    there = candidates(rule, validation, metric, (exit_layers, 6, method))
    confidence, predictions = rule.confidences(validation.logits), validation.logits.argmax(-1)
    assert there.thresholds[-1] == 1
    assert set(np.float32(there.thresholds)) >= set(confidence[:-1][confidence[:-1] < 1].clip(1 / C).numpy())
    for threshold, its_score, ratio in zip(*there, strict=True):
        taken = exits_taken(confidence, threshold, rule.lowest)
        chosen = predictions.gather(0, taken[None])[0]
        assert its_score == pytest.approx(score(chosen.numpy(), validation.labels.numpy(), metric))
        assert ratio == pytest.approx(np.array(exit_costs(exit_layers, 6, method, threshold))[taken].mean())


def test_the_fastest_within_the_loss_and_the_best_within_the_speed_are_chosen():
    there = Candidates(np.array([0.5, 0.6, 0.7, 1.0]), np.array([80.0, 84.0, 86.0, 85.0]), np.array([0.2, 0.4, 0.6, 1]))
    assert choose(there, max_loss=1.0) == (0.6, True)
    assert choose(there, max_loss=0.5) == (0.7, True)
    assert choose(there, max_loss=50) == (0.5, True)
    assert choose(there, speed=0.5) == (0.6, True)
    assert choose(there, speed=1) == (0.7, True)
    assert choose(there, speed=0.1) == (0.5, False)  # nothing is so fast: the fastest there is
    ties = Candidates(np.array([0.5, 0.6, 1.0]), np.array([80.0, 81.0, 81.0]), np.array([0.3, 0.3, 1.0]))
    assert choose(ties, max_loss=5) == (0.6, True)
    assert choose(ties, speed=1) == (0.6, True)


def test_each_half_is_scored_at_the_other_halfs_threshold():
    # At the first exit even rows are right, odd ones surer and wrong; the last exit is always right.
    sure = torch.tensor([[4.0, 0.0]])
    first = torch.where(torch.arange(20)[:, None] % 2 == 0, sure + torch.rand(20, 1), sure.flip(1) * 2)
    validation = Validation(torch.stack([first, sure.expand(20, 2)]), None, torch.zeros(20, dtype=torch.int64))
    point = operating_point(validation, "accuracy", "none", ((1, 2), 2, "sweet"), {"max_loss": 0.0})
    # Even rows choose a low threshold, where the odd ones leave wrongly. Odd rows choose 1: the even ones pay in full.
    assert point["full_depth_score"] == 100
    assert point["score"] == 50
    assert point["speedup_ratio"] == pytest.approx(0.75)
    assert point["reached"]
    assert point["threshold"] == 1  # of all rows: below it the odd ones are lost


def test_a_branch_models_full_depth_costs_the_plain_model():
    validation = random_validation(0, 3, 40, 2)
    there = candidates(ExitRule(2), validation, "accuracy", ((1, 2, 6), 6, "branch"))
    assert there.ratios[-1] == 1
    assert there.ratios[:-1].max() > 1
