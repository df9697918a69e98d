"""The operating point: the threshold to deploy, what it promises, and the draws of rows that it is made of."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.adaptive import ExitRule, Exits, exits_taken, spaced_thresholds
from minisweet.evaluation.metrics import score
from minisweet.evaluation.operating import (
    Candidates,
    between,
    candidates,
    choose,
    loss_interval,
    loss_of,
    most_changes,
    operating_point,
    rows_to_certify,
    shortfall,
    standard_error,
    stated,
    wish_of,
)
from minisweet.evaluation.sweep import Validation, draw_keys, folds_of, reliability, sweep

EVERY = torch.arange
WISHES = [{"max_loss": 1.0}, {"speed": 0.5}, {"max_change": 10.0, "sure": 80.0}]


def random_validation(seed: int, K: int, N: int, C: int, method: str = "sweet", metric: str = "accuracy", lte=False):
    """Logits with many ties, so that confidences coincide."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(K, N, C, generator=generator) * 2).round()
    labels = torch.randint(0, C, (N,), generator=generator)
    certainty = torch.rand(K, N, generator=generator) if lte else None
    exits = Exits(tuple(range(1, K + 1)), 6, method)
    return Validation(logits, certainty, labels, draw_keys([f"text {n}" for n in range(N)]), metric, exits)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    K=st.integers(1, 4),
    N=st.integers(1, 30),
    C=st.integers(2, 4),
    method=st.sampled_from(["sweet", "mm", "branch"]),
    metric=st.sampled_from(["accuracy", "matthews"]),
)
def test_every_candidate_gives_what_the_sweep_gives(seed, K, N, C, method, metric):
    validation, rule = random_validation(seed, K, N, C, method, metric), ExitRule(C)
    certifying = EVERY(N)[::2]
    there = candidates(rule, validation, certifying)
    confidence, predictions = rule.confidences(validation.logits), validation.logits.argmax(-1)
    assert there.thresholds[-1] == 1
    assert set(np.float32(there.thresholds)) >= set(confidence[:-1][confidence[:-1] < 1].clip(1 / C).numpy())
    full_depth = score(predictions[-1].numpy(), validation.labels.numpy(), metric)
    for place, threshold in enumerate(there.thresholds):
        for deployed in (threshold, between(there.thresholds, place, rule.lowest)):
            taken = exits_taken(confidence, deployed, rule.lowest)
            chosen = predictions.gather(0, taken[None])[0]
            its_score = score(chosen.numpy(), validation.labels.numpy(), metric)
            assert loss_of(there.cells[:, place], metric) == pytest.approx(full_depth - its_score)
            assert there.ratios[place] == pytest.approx(np.array(validation.exits.costs(deployed))[taken].mean())
            assert there.changes[place] == (chosen != predictions[-1])[certifying].sum()
            said = stated(rule, validation, deployed)
            assert (said["score"], said["full_depth_score"]) == (pytest.approx(its_score), pytest.approx(full_depth))
            assert said["speedup_ratio"] == pytest.approx(there.ratios[place])


def cells_of(right: list[tuple[int, int, int]]) -> np.ndarray:
    """Of candidates, from how many rows both have right, full depth alone, and early exit alone; 100 rows each."""
    columns = [[0, 0, 0, 0, 100 - sum(counts), counts[2], counts[1], counts[0]] for counts in right]
    return np.array(columns, dtype=np.float64).T


def test_a_wish_takes_the_fastest_or_the_best_that_grants_it():
    cells = cells_of([(78, 7, 2), (80, 5, 3), (83, 2, 3), (85, 0, 0)])  # 80, 83, 86, 85
    there = Candidates(np.array([0.5, 0.6, 0.7, 1.0]), np.array([0.2, 0.4, 0.6, 1]), cells, np.array([9, 8, 5, 0]))
    assert choose(there, "accuracy", {"speed": 0.5}, 100) == (1, True)
    assert choose(there, "accuracy", {"speed": 1}, 100) == (2, True)
    assert choose(there, "accuracy", {"speed": 0.1}, 100) == (0, False)  # nothing is so fast: the fastest there is
    assert choose(there, "accuracy", {"max_loss": 50}, 100) == (0, True)
    half_errors = standard_error(cells, "accuracy") / 2
    assert half_errors == pytest.approx([50 * np.std([1] * b + [-1] * c + [0] * (100 - b - c), ddof=1) / 10
                                         for b, c in ((7, 2), (5, 3), (2, 3), (0, 0))])  # fmt: skip
    assert choose(there, "accuracy", {"max_loss": 2 + half_errors[1]}, 100) == (1, True)
    assert choose(there, "accuracy", {"max_loss": 2 + half_errors[1] - 0.01}, 100) == (2, True)
    assert choose(there, "accuracy", {"max_loss": 0}, 100) == (3, True)  # 0.7 gains a point, but not surely
    assert choose(there, "accuracy", {"max_change": 50, "sure": 90}, 100) == (0, True)
    assert choose(there, "accuracy", {"max_change": 10, "sure": 90}, 100) == (2, True)  # at most 5 of 100 pass
    assert choose(there, "accuracy", {"max_change": 5, "sure": 90}, 100) == (3, True)


def test_what_is_passed_after_a_failure_does_not_count():
    cells = cells_of([(85, 0, 0), (70, 15, 0), (85, 0, 0), (85, 0, 0)])
    there = Candidates(np.array([0.5, 0.6, 0.7, 1.0]), np.array([0.2, 0.4, 0.6, 1]), cells, np.array([0, 15, 0, 0]))
    assert choose(there, "accuracy", {"max_loss": 1.0}, 100) == (2, True)
    assert choose(there, "accuracy", {"max_change": 3, "sure": 90}, 100) == (2, True)


@given(st.integers(1, 400), st.sampled_from([0.5, 1, 3, 10, 40, 99]), st.sampled_from([0.5, 0.1, 1e-3]))
@settings(max_examples=60, deadline=None)
def test_the_binomial_tail_is_exact(rows, percent, error):
    share, tail, allowed = Fraction(percent) / 100, Fraction(0), -1
    for k in range(rows + 1):
        tail += math.comb(rows, k) * share**k * (1 - share) ** (rows - k)
        if tail > Fraction(error):
            break
        allowed = k
    assert most_changes(rows, percent / 100, error) == allowed


def test_the_rows_that_a_certificate_needs():
    assert (most_changes(229, 0.01, 0.1), most_changes(230, 0.01, 0.1)) == (-1, 0)
    assert most_changes(0, 0.01, 0.1) == -1
    allowed, (n, p) = most_changes(40_000, 0.02, 0.1), (40_000, 0.02)
    log = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(allowed + 2)]
    each = [math.exp(log[k] + k * math.log(p) + (n - k) * math.log(1 - p)) for k in range(allowed + 2)]
    assert sum(each[:-1]) <= 0.1 < sum(each)
    point = {"reached": True, "threshold": 1.0, "certified_rows": 97, "wish": {"max_change": 1.0, "sure": 90.0}}
    assert "230 rows would do if none changed, and 97 certify here" in shortfall(point, 4)
    assert "too many of the 300 that certify here do" in shortfall(point | {"certified_rows": 300}, 4)
    assert not shortfall(point | {"threshold": 0.9}, 4)
    assert not shortfall(point | {"wish": {"max_loss": 1.0}}, 4)


@given(st.sampled_from([0.01, 0.5, 1, 3, 10, 50, 80, 90, 95, 99, 99.99]), st.sampled_from([50, 80, 87.5, 90, 95, 99.9]))
def test_the_rows_that_are_named_are_the_fewest_that_certify(percent, sure):
    share, error = percent / 100, (100 - sure) / 100
    rows = rows_to_certify(share, error)
    assert [most_changes(n, share, error) >= 0 for n in (rows - 1, rows)] == [False, True]


@pytest.mark.parametrize("wish", [{"max_loss": 1.0}, {"speed": 0.7}, {"max_change": 3.0, "sure": 90.0}])
def test_rows_of_confidence_1_leave_at_the_highest_threshold_below(wish):
    """Of 300 rows the first exit is certain of 250, which float32 rounds to 1, and wrong on the others."""
    labels = torch.arange(300) % 2
    wrong = torch.arange(300) >= 250
    first = torch.nn.functional.one_hot(labels ^ wrong, 2) * torch.where(wrong, 0.3, 40.0)[:, None]
    logits = torch.stack([first, torch.nn.functional.one_hot(labels, 2) * 40.0])
    validation = Validation(logits, None, labels, EVERY(300), "accuracy", Exits((1, 2), 2, "sweet"))
    _, point = operating_point(validation, "none", wish)
    assert (point["loss"], point["reached"]) == (0, True)
    assert point["speedup_ratio"] == pytest.approx((250 * 0.5 + 50) / 300)
    assert 0.58 < point["threshold"] < 1


def test_of_one_row_nothing_is_promised():
    validation = random_validation(1, 2, 1, 2)
    validation = validation._replace(logits=torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]), labels=torch.tensor([1]))
    _, point = operating_point(validation, "none", {"max_loss": 1.0})
    assert (point["threshold"], point["loss"]) == (1.0, 0)
    low, high = loss_interval(np.eye(8)[6], "accuracy")
    assert -100 <= low < high == 100


def draw(rng: np.random.Generator, N: int) -> Validation:
    """Rows of two exits; the first is sure of each by a random number above 1/2, and what that is worth falls with it.

    Of the rows that are sure by 1/2 + x it changes (1 - 2x) 2/5, so that at threshold t (1 - t)^2 4/5 of all change.
    """
    sure, full = rng.uniform(0.5, 1, N), rng.integers(0, 2, N)
    early = np.where(rng.random(N) < 0.8 * (1 - sure), 1 - full, full)
    logits = np.stack([np.log(sure / (1 - sure))[:, None] * np.eye(2)[early], 3 * np.eye(2)[full]])
    keys = torch.from_numpy(rng.integers(0, 2**62, N))
    labels = torch.from_numpy(full)
    return Validation(torch.from_numpy(logits).float(), None, labels, keys, "agreement", Exits((1, 2), 2, "sweet"))


def certified(validation: Validation, calibration: str, percent: float) -> tuple[ExitRule, float]:
    rule, point = operating_point(validation, calibration, {"max_change": percent, "sure": 90.0})
    return rule, point["threshold"]


def naive(validation: Validation, calibration: str, percent: float) -> tuple[ExitRule, float]:
    """The fastest threshold that changes no more of these very rows."""
    rule = validation.fit_rule(EVERY(len(validation.labels)), calibration)
    there = candidates(rule, validation, EVERY(len(validation.labels)))
    return rule, there.thresholds[np.flatnonzero(there.changes <= percent / 100 * len(validation.labels))[0]]


@pytest.mark.parametrize(
    ("choice", "calibration", "draws", "keeps"),
    [(certified, "none", 1000, True), (naive, "none", 1000, False), (certified, "crossfit", 200, True)],
)
def test_a_certificate_is_kept_in_nine_of_ten_draws(choice, calibration, draws, keeps):
    rng, percent, broken, shares = np.random.default_rng(7), 3.0, 0, []
    for _ in range(draws):
        rule, threshold = choice(draw(rng, 400), calibration, percent)
        scaled = 1.0 if rule.temperatures is None else float(rule.temperatures[0])
        sure = 1 / (1 + (1 / threshold - 1) ** scaled)  # what the threshold is without the temperature
        broken += 80 * (1 - sure) ** 2 > percent
        shares.append(2 * (1 - sure))  # of all new text, that leaves at the first exit
    assert (broken <= 0.13 * draws) == keeps
    assert 0.15 < np.mean(shares) < 0.5


def test_the_interval_of_the_loss_is_bonett_and_prices():
    # Full depth alone has 12 of 100 right, early exit alone 5: (13 - 6) / 102, and its deviation.
    cells = cells_of([(70, 12, 5)])[:, 0]
    difference, spread = 7 / 102, 1.959964 * math.sqrt((19 / 102 - (7 / 102) ** 2) / 102)
    assert loss_interval(cells, "accuracy") == pytest.approx([100 * (difference - spread), 100 * (difference + spread)])
    low, high = loss_interval(cells_of([(90, 0, 0)])[:, 0], "accuracy")
    assert low == -high  # none is discordant, and yet it is no certainty
    assert 2 < high < 3


def test_the_interval_of_matthews_correlation_covers_the_truth():
    rng, truth = np.random.default_rng(0), np.array([300, 20, 30, 50, 60, 30, 60, 450]) / 1000
    expected, held = loss_of(truth, "matthews"), 0
    for _ in range(200):
        low, high = loss_interval(rng.multinomial(300, truth).astype(float), "matthews")
        held += low <= expected <= high
    assert 180 <= held < 200
    low, high = loss_interval(np.array([50.0, 0, 0, 5, 5, 0, 0, 40]), "matthews")
    assert low < 0 < high


def test_the_standard_error_of_matthews_correlation_is_that_of_draws():
    rng, truth = np.random.default_rng(0), np.array([300, 20, 30, 50, 60, 30, 60, 450]) / 1000
    losses = loss_of(rng.multinomial(1000, truth, 4000).T.astype(float), "matthews")
    assert standard_error(1000 * truth[:, None], "matthews")[0] == pytest.approx(losses.std(), rel=0.05)


def test_a_deployed_threshold_lies_midway_to_the_next_lower_confidence():
    thresholds = np.array([0.6, 0.7, 0.8, 1.0])
    assert between(thresholds, 2, 0.5) == pytest.approx(0.75)
    assert between(thresholds, 0, 0.5) == pytest.approx(0.55)
    assert between(thresholds, 3, 0.5) == 1
    assert between(np.array([0.5, 1.0]), 0, 0.5) == 0.5
    close = np.array([0.7, np.nextafter(np.float32(0.7), np.float32(1))], dtype=np.float64)
    assert np.float32(0.7) < np.float32(between(close, 1, 0.5)) <= np.float32(close[1])


@pytest.mark.parametrize("lte", [False, True])
@pytest.mark.parametrize("calibration", ["crossfit", "dev", "none"])
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("metric", ["accuracy", "matthews", "agreement"])
def test_an_operating_point_tells_of_itself_on_all_rows(wish, metric, calibration, lte):
    keys = ["threshold", "score", "macro_f1", "full_depth_score", "loss", "loss_interval", "speedup_ratio"]
    keys += ["speedup_interval", "reached", "wish"] + ["certified_rows", "certified_changes"] * ("max_change" in wish)
    for method, K, N in (("sweet", 3, 120), ("branch", 3, 120), ("mm", 3, 120), ("sweet", 1, 40), ("branch", 2, 2)):
        validation = random_validation(3, K, N, 2, method, metric, lte)
        if metric == "agreement":
            validation = validation._replace(labels=validation.logits[-1].argmax(-1))
        rule, point = operating_point(validation, calibration, wish)
        assert list(point) == keys
        assert point["loss"] == pytest.approx(point["full_depth_score"] - point["score"])
        assert point["loss_interval"][0] <= point["loss"] <= point["loss_interval"][1]
        assert point["speedup_interval"][0] <= point["speedup_ratio"] + 1e-9
        assert point["speedup_ratio"] <= point["speedup_interval"][1] + 1e-9
        swept, taken = sweep([(rule, EVERY(N))], validation, [point["threshold"]])
        assert swept["scores"] == pytest.approx([point["score"]])
        assert swept["speedup_ratios"] == pytest.approx([point["speedup_ratio"]])
        if K == 1:
            assert (point["threshold"], point["loss"], point["loss_interval"]) == (1, 0, [0, 0])
            assert point["reached"] == ("speed" not in wish or 1 / 6 <= wish["speed"])
        if "max_change" in wish:
            fits = calibration != "none" or lte
            assert point["certified_rows"] == N - math.ceil(N / 4) * fits
            predictions = validation.logits.argmax(-1)
            changed = predictions.gather(0, taken)[0] != predictions[-1]
            certifying = validation.drawn(4)[1] if fits else EVERY(N)
            assert point["certified_changes"] == changed[certifying].sum()


def test_the_default_wish():
    none = dict.fromkeys(("max_loss", "speed", "max_change")) | {"sure": 90.0}
    assert wish_of(True, **none) == {"max_loss": 1.0}
    assert wish_of(False, **none) == {"max_change": 3.0, "sure": 90.0}
    assert wish_of(False, **none | {"max_loss": 2.0}) == {"max_loss": 2.0}
    assert wish_of(False, **none | {"speed": 0.5}) == {"speed": 0.5}
    assert wish_of(True, **none | {"max_change": 1.0, "sure": 99.0}) == {"max_change": 1.0, "sure": 99.0}


def test_the_halves_are_drawn_class_by_class_whatever_the_order():
    N = 200
    validation = random_validation(0, 2, N, 2)._replace(labels=EVERY(N) % 2)  # a file whose labels alternate
    for parts, size in ((2, 100), (4, 50)):
        first, others = validation.drawn(parts)
        assert sorted([*first.tolist(), *others.tolist()]) == list(range(N))
        assert validation.labels[first].bincount().tolist() == [size // 2] * 2
    first, _ = validation.drawn(2)
    shuffled = torch.from_numpy(np.random.default_rng(1).permutation(N))
    moved = validation._replace(
        logits=validation.logits[:, shuffled], labels=validation.labels[shuffled], keys=validation.keys[shuffled]
    )
    assert shuffled[moved.drawn(2)[0]].tolist() == first.tolist()
    thresholds = spaced_thresholds(11, 0.5)
    for calibration in ("crossfit", "none"):
        ours, theirs = (sweep(folds_of(rows, calibration), rows, thresholds)[0] for rows in (validation, moved))
        assert ours == theirs
        ours, theirs = (reliability(folds_of(rows, calibration), rows) for rows in (validation, moved))
        for name in ours:
            assert ours[name]["after"] == pytest.approx(theirs[name]["after"])
        for wish in WISHES:
            ours, theirs = (operating_point(rows, calibration, wish)[1] for rows in (validation, moved))
            for key in ours.keys() - {"wish"}:
                assert ours[key] == pytest.approx(theirs[key]), key


def test_each_half_is_decided_by_the_rule_of_the_other():
    validation = random_validation(5, 2, 100, 3)
    halves = validation.drawn(2)
    (first, rows), (second, others) = folds_of(validation, "crossfit")
    assert [rows.tolist(), others.tolist()] == [halves[1].tolist(), halves[0].tolist()]
    changed = validation.labels.clone()
    changed[rows] = 2 - changed[rows]  # labels of a half must not reach the temperatures of that half
    again = validation._replace(labels=changed).fit_rule(halves[0], "crossfit")
    assert torch.equal(again.temperatures, first.temperatures)
    assert not torch.equal(second.temperatures, first.temperatures)
    ((rule, all_rows),) = folds_of(validation, "dev")
    assert all_rows.tolist() == list(range(100))
    thresholds = spaced_thresholds(7, 1 / 3)
    _, taken = sweep(folds_of(validation, "crossfit"), validation, thresholds)
    for one, part in ((first, rows), (second, others)):
        confidence = one.confidences(validation.logits[:, part])
        for i, threshold in enumerate(thresholds):
            assert torch.equal(taken[i, part], exits_taken(confidence, threshold, one.lowest))


@pytest.mark.parametrize("labels", [[1], [1, 1], [0, 1], [1] * 40])
def test_temperatures_of_one_class_or_two_rows_keep_within_reason(labels):
    N = len(labels)
    logits = torch.tensor([[-3.0, 3.0]]).repeat(N, 1).expand(3, N, 2) * torch.tensor([1, -1, 2])[:, None, None]
    validation = random_validation(0, 3, N, 2)._replace(logits=logits, labels=torch.tensor(labels))
    for rule, _ in [*folds_of(validation, "crossfit"), *folds_of(validation, "dev")]:
        assert all(0.2 < temperature < 30 for temperature in rule.temperatures)
