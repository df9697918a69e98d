"""What is deployed: who chooses and who judges, where the judges stop, and what is promised and stated of new text."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisweet.adaptive import ExitRule, Exits
from minisweet.evaluation.calibration import fit_rule
from minisweet.evaluation.operating import choose, fixed_sequence, split, stated, wilson
from minisweet.outputs import Outputs
from minisweet.runs.deployed import how_sure

GOAL, SHARE = {"max_lost": 3.0, "sure": 90.0}, {"max_share": 0.5}


def random_validation(seed: int, layers: tuple, N: int, C: int = 2, method="sweet", metric="accuracy") -> Outputs:
    """Logits with many ties, so that confidences coincide. For "agreement" no row has a label."""
    generator, K = torch.Generator().manual_seed(seed), len(layers)
    logits = (torch.randn(K, N, C, generator=generator) * 2).round()
    labels = torch.randint(0, C, (N,), generator=generator) if metric != "agreement" else torch.full((N,), -1)
    in_vain = {"branch": [1 / 6] * K, "mm": layers}.get(method, [0] * K)
    exits = Exits(layers, in_vain, layers[-1], asks_at_1=method == "mm")
    return Outputs(logits, None, labels, torch.randperm(10 * N, generator=generator)[:N], metric, exits)


def two_exits(sure, early, full, labels) -> Outputs:
    """Exits 0 and 6 by what they answer, and how sure the first one is of it: (N,) each, of two classes."""
    logits = np.stack([np.log(sure / (1 - sure))[:, None] * np.eye(2)[early], 2 * np.eye(2)[full]])
    keys, exits = np.random.default_rng(0).permutation(len(labels)), Exits([0, 6], [0, 0], 6, False)
    logits, labels, keys = torch.from_numpy(logits).float(), torch.as_tensor(labels), torch.from_numpy(keys)
    return Outputs(logits, None, labels, keys, "accuracy", exits)


def draw(seed: int, N: int) -> Outputs:
    """Full depth is right on 86%. Where the first exit is sure by s, it changes 0.8 (1 - s) of full depth's answers."""
    rng = np.random.default_rng(seed)
    sure, labels = rng.uniform(0.5, 1, N), rng.integers(0, 2, N)
    full = np.where(rng.random(N) < 0.86, labels, 1 - labels)
    return two_exits(sure, np.where(rng.random(N) < 0.8 * (1 - sure), 1 - full, full), full, labels)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0.001, 0.999))
def test_how_sure_texts_are_is_the_exact_binomial_test(n, part, p):
    lost = [0, int(part * n), n]
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    assert how_sure(n, lost, p) == pytest.approx([1 - sum(chances[: k + 1]) for k in lost], abs=1e-9)
    assert how_sure(10**6, [29_800], 0.03) == pytest.approx(NormalDist().cdf(199.5 / 29_100**0.5), abs=1e-3)


@given(st.integers(0, 10**6), st.sampled_from([20, 100, 400]), st.sampled_from([1.0, 5.0, 20.0]), st.integers(50, 99))
def test_judges_stop_before_the_first_threshold_that_fails(seed, N, limit, sure):
    rows, thresholds = draw(seed, N), np.r_[np.sort(np.random.default_rng(seed).uniform(0.5, 1, 12)), 1]
    confidence, (early, full) = ExitRule(2).confidences(rows.logits)[0].numpy(), rows.logits.argmax(-1).numpy()
    expected = 1.0
    for threshold in thresholds[-2::-1]:  # downwards
        is_lost = (confidence >= np.float32(threshold)) & (full == rows.labels.numpy()) & (early != full)
        if how_sure(N, [is_lost.sum()], limit / 100) < sure / 100:
            break
        expected = threshold
    assert fixed_sequence(ExitRule(2), rows, {"max_lost": limit, "sure": sure}, [0, 1], thresholds)[0] == expected


def test_judges_stop_even_if_a_lower_threshold_would_pass_again():
    """The 28 rows that the first exit is surest of are lost: 7 of 100 rows, or 70 of the first 100 that leave."""
    sure = np.linspace(0.55, 0.95, 400)
    rows = two_exits(sure, np.where(sure > 0.922, 0, 1), np.ones(400, int), np.ones(400, int))
    goals = [GOAL, {"max_lost": 10.0, "sure": 90.0}, {"max_share": 0.0}, {"max_share": 0.4}, {"max_share": 1.0}]
    found = [fixed_sequence(ExitRule(2), rows, goal, [0, 1], np.array([0.5, 0.7, 0.91, 0.99, 1]))[0] for goal in goals]
    assert found == [0.99, 0.5, 0.5, 0.7, 1]


def test_promises_are_broken_in_at_most_one_of_ten_draws():
    thresholds, broken = np.linspace(0.5, 1, 26), 0
    for seed in range(300):
        threshold, _, _ = fixed_sequence(ExitRule(2), draw(seed, 300), GOAL, [0, 1], thresholds)
        broken += 0.86 * 0.8 * (1 - threshold) ** 2 > 0.03  # how many are lost in the long run, see `draw`
    assert 0 < broken <= 30 + 2 * (300 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize(("rows", "lost", "is_fast"), [(101, 0, 0), (102, 0, 1), (171, 1, 0), (172, 1, 1), (172, 2, 0)])
def test_76_texts_can_promise_where_none_is_lost_and_129_where_one_is(rows, lost, is_fast):
    validation = two_exits(np.full(rows, 0.9), *np.ones((3, rows), int))
    validation.logits[0, split(validation)[1][:lost]] *= -1
    point = choose(validation, GOAL, exits=[0, 6])
    assert point.lost == (100 * lost / point.judging_texts if is_fast else 0)
    assert (point.threshold < 1) == bool(point.promise) == (not point.shortfall()) == is_fast


def test_a_text_counts_once_and_is_lost_if_any_of_its_rows_is():
    validation, rng = draw(0, 300), np.random.default_rng(0)
    for goal in (GOAL, SHARE):
        assert choose(validation, goal) == choose(validation.take(rng.permutation(300)), goal)
    uneven = validation.take(np.arange(300).repeat(rng.integers(1, 9, 300)))
    assert [len(np.unique(uneven.keys[rows])) for rows in split(uneven)[:2]] == [75, 225]
    ours, theirs = (stated(ExitRule(2), [0, 1], 0.7, rows, rows) for rows in (validation, uneven))
    assert all(theirs[key] == pytest.approx(ours[key]) for key in theirs if key != "per_class")
    both = two_exits(np.full(2, 0.9), np.array([0, 0]), np.array([1, 1]), [0, 1])._replace(keys=torch.zeros(2).long())
    point = stated(ExitRule(2), [0, 1], 0.7, both, both)  # a text under two labels, of which one is lost
    assert (point["judging_texts"], point["lost"], point["score"]) == (1, 100, 50)


def test_texts_that_were_trained_on_neither_choose_nor_judge():
    validation, known = draw(5, 300), draw(5, 300).keys.tolist()
    choosing, judging, left_out = split(validation, known[:100])
    assert ({*choosing, *judging}, len(judging), left_out) == ({*range(100, 300)}, 150, 100)
    for goal in (GOAL, SHARE):  # nobody is left
        point = choose(validation, goal, known)
        assert (point.threshold, point.judging_texts, point.lost, point.lost_interval) == (1, 0, 0, None)


@pytest.mark.parametrize(("labelled", "word"), [(404, "lost"), (396, "changed"), (0, "changed")])
def test_where_few_have_a_label_the_others_judge_what_is_changed(labelled, word):
    rows = draw(7, 2000)._replace(metric="accuracy" if labelled else "agreement")
    rows.labels[labelled:] = -1
    point, (choosing, judging, _) = choose(rows, GOAL), split(rows)
    judges = judging[(judging < labelled) == (word == "lost")]
    _, (answers,), _ = rows.take(judges).decide_at(point.rule, [0, 1], [point.threshold])
    is_right = (full := rows.logits[-1].argmax(-1).numpy()) == rows.labels.numpy()
    is_lost = (answers != full[judges]) & (is_right[judges] | (word == "changed"))
    assert (point.lost_means, point.judging_texts) == (word, len(judges))
    assert point.lost == pytest.approx(100 * is_lost.mean())
    of_labels = fit_rule(rows.take(choosing[choosing < labelled])).temperatures[-1] if labelled else 1
    score = 100 * is_right[judging[judging < labelled]].mean() if labelled else 100
    assert (point.temperatures[-1], point.full_depth) == (of_labels, pytest.approx(score))


def test_exits_that_cost_more_than_they_give_are_not_asked():
    rows, guess = draw(0, 1000), torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    layers, logits = [1, 2, 3, 6], torch.stack([guess, rows.logits[0], guess, rows.logits[1]])  # two exits guess
    validation = rows._replace(logits=logits, exits=Exits(layers, [1 / 6] * 4, 6, False))
    for goal in (GOAL, {"max_share": 0.6}):
        point = choose(validation, goal)
        assert (point.exits, len(point.temperatures), point.share < 0.95) == ([2, 6], 2, True)
        assert choose(validation, goal, exits=layers).exits == layers


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ["accuracy", "matthews", "agreement"])
@pytest.mark.parametrize("goal", [GOAL, SHARE, {"max_lost": 40.0, "sure": 50.0}])
def test_intervals_hold_what_is_stated(goal, metric):
    cases = [("sweet", (1, 2, 4), 120), ("branch", (1, 2, 4), 120), ("mm", (1, 2, 4), 120), ("sweet", (4,), 40)]
    for method, layers, N in [*cases, ("branch", (2, 4), 2), ("sweet", (4,), 1)]:
        point = choose(random_validation(3, layers, N, 2, method, metric), goal)
        assert "max_share" in goal or point.share <= 1  # not slower than full depth
        assert len(point.temperatures) == len(point.exits)
        for name in ("score", "full_depth", "lost", "share"):
            ends = getattr(point, f"{name}_interval")
            assert (ends is None) == (N == 1 or (metric != "accuracy" and name in ("score", "full_depth")))
            assert ends is None or 0 <= ends[0] <= getattr(point, name) <= ends[1] <= 100
        assert len(layers) > 1 or (point.threshold, point.lost, point.share) == (1, 0, 1)


@pytest.mark.parametrize(("n", "p"), [(76, 0.01), (240, 0.02), (240, 0.9), (1000, 0.5)])
def test_intervals_are_as_wide_as_theory_says(n, p):
    low, high = np.transpose([wilson(np.arange(n) < k) for k in range(n + 1)])
    chances = -np.diff([1, *how_sure(n, np.arange(n + 1), p)])
    assert 0.94 < chances[(low <= 100 * p) & (100 * p <= high)].sum() < 0.995
    rows = draw(n, 4000)
    low, high = stated(ExitRule(2), [0, 1], 0.7, rows, rows)["share_interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.4**0.5 * 0.6**0.5 / 4000**0.5, rel=0.05)  # 6 of 10 leave


def test_words():
    point = choose(draw(0, 1000), GOAL)
    point = replace(point, threshold=0.8, lost_means="lost", judging_texts=744, lost=1400 / 744, share=1.0)
    seen = "On 744 of your texts that the model had not seen, early exit lost 14 answers that the full model had right."
    assert point.promise == f"{seen} In the long run at most 3 in 100 new texts like these are lost, 90% sure."
    assert replace(point, goal=SHARE).promise == seen
    assert "changed 14 answers of the full model. In" in replace(point, lost_means="changed").promise
    assert not replace(point, threshold=1.0).promise + point.shortfall()
    few = replace(point, threshold=1.0, judging_texts=60)
    words = "60 texts judged. Some 510 labelled rows would do where none is lost, 860 and 1,175 where one or two are"
    assert few.shortfall(0.2) == f"nothing faster than full depth can be promised: {words}"
    assert "Some 102 rows without a label" in replace(few, lost_means="changed").shortfall()
    assert "too many of 744 texts are lost" in replace(point, threshold=1.0).shortfall()
    assert replace(few, goal=SHARE).shortfall() == "at most 0.5 of the layers is out of reach: the fastest takes 1"
