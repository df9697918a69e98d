"""The operating point: who chooses and who judges, where the judges stop, and what is stated and promised."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minisweet.adaptive import ExitRule, Exits
from minisweet.evaluation import operating
from minisweet.evaluation.answers import AnsweredRows
from minisweet.evaluation.goals import shortfall
from minisweet.evaluation.operating import deal, operating_point, reweighted, stated, walk

GOALS = ({"speed": 0.5}, {"max_loss": 2.0, "sure": 70.0}, {"max_change": 10.0, "sure": 80.0})
STATED = {"score": "score", "full_depth": "full_depth_score", "loss": "loss", "speedup": "speedup_ratio"}


def random_validation(seed: int, layers: tuple, N: int, C: int = 2, method="sweet", metric="accuracy", lte=False):
    """Logits with many ties, so that confidences coincide."""
    generator, K = torch.Generator().manual_seed(seed), len(layers)
    logits = (torch.randn(K, N, C, generator=generator) * 2).round()
    labels = torch.randint(0, C, (N,), generator=generator)
    certainty = torch.rand(K, N, generator=generator) if lte else None
    keys = torch.randperm(10 * N, generator=generator)[:N]
    return AnsweredRows(logits, certainty, labels, keys, metric, Exits(layers, layers[-1], method))


def draw(rng: np.random.Generator, N: int) -> AnsweredRows:
    """Rows of exits 0 and 6. The first is sure of each by a random number, and right the more often the surer it is.

    Full depth is right on 86%. Of the rows that are sure by 1/2 + x the first exit changes (1 - 2x) 2/5.
    """
    sure, labels = rng.uniform(0.5, 1, N), rng.integers(0, 2, N)
    full = np.where(rng.random(N) < 0.86, labels, 1 - labels)
    early = np.where(rng.random(N) < 0.8 * (1 - sure), 1 - full, full)
    return two_exits(sure, early, full, labels, rng.permutation(10 * N)[:N])


def two_exits(sure, early, full, labels, keys) -> AnsweredRows:
    """Exits 0 and 6 by what they answer, and how sure the first one is of it: (N,) each, of two classes."""
    logits = np.stack([np.log(sure / (1 - sure))[:, None] * np.eye(2)[early], 2 * np.eye(2)[full]])
    labels, keys = torch.as_tensor(labels), torch.as_tensor(keys)
    return AnsweredRows(torch.from_numpy(logits).float(), None, labels, keys, "accuracy", Exits((0, 6), 6, "branch"))


def point_of(validation: AnsweredRows, goal: dict, trained=None, asked=None) -> dict:
    return operating_point(validation, goal, deal(validation, trained), asked)[1]


@pytest.mark.parametrize("parts", [4, 5])
def test_texts_are_dealt_out_class_by_class_in_any_order(parts):
    validation = random_validation(0, (1, 2), 200)._replace(labels=torch.arange(200) % 2)  # labels that alternate
    found = validation.parts(parts)
    assert np.bincount(2 * found + np.arange(200) % 2).tolist() == [100 // parts] * (2 * parts)
    order = np.random.default_rng(1).permutation(200)
    assert validation.take(order).parts(parts).tolist() == found[order].tolist()
    repeated = validation.take(np.random.default_rng(2).integers(20, size=200))
    # a text under two labels is in one part too
    both = repeated._replace(labels=torch.from_numpy(np.random.default_rng(3).integers(2, size=200)))
    for rows in (repeated, both):
        found, keys = rows.parts(parts), rows.keys.numpy()
        assert all(len(set(found[keys == key])) == 1 for key in keys)
        assert len(set(found)) == parts
    assert np.array_equal(deal(validation).choosing, np.flatnonzero(validation.parts(4) == 0))


def test_texts_that_were_trained_on_neither_choose_nor_judge():
    validation, goal = draw(np.random.default_rng(5), 300), {"max_change": 5.0, "sure": 90.0}
    known = validation.keys.tolist()
    assert point_of(validation, goal)["trained_rows"] is None
    sides = deal(validation, known[:100])
    assert {*sides.choosing, *sides.judging} == {*range(100, 300)}
    point = point_of(validation, goal, known[:100])
    assert (point["choosing_texts"], point["judging_texts"], point["trained_rows"]) == (50, 150, 100)
    for goal in GOALS:  # nobody is left: nothing is promised
        point = point_of(validation, goal, known)
        assert (point["choosing_texts"], point["judging_texts"], point["trained_rows"]) == (0, 0, 300)
        assert point["threshold"] == 1 or "speed" in goal


@pytest.mark.parametrize("lost", [0, 1, 4])
def test_judges_are_as_sure_as_the_binomial_test_where_texts_are_only_lost(lost):
    n, p = 150, 0.03
    labels, early = np.ones(n, int), np.arange(n) >= lost
    rows = two_exits(np.full(n, 0.9), early.astype(int), labels, labels, np.arange(n))
    # the share of lost texts is Beta(lost + 1, n - lost): at most p with the probability of more than `lost` in n draws
    expected = 100 * (1 - sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(lost + 1)))
    close = {"abs": 4} if lost else {"rel": 1e-9}
    assert operating.how_sure(rows, early[None].astype(int), 100 * p)[0] == pytest.approx(expected, **close)


def test_judges_stop_at_the_first_threshold_at_which_they_are_not_sure():
    """The rows that the first exit is surest of are lost, and those below are won: later, all is well again."""
    n = 400
    sure = np.linspace(0.55, 0.95, n)
    early, full = np.where(sure > 0.9, 0, 1), np.where(sure > 0.9, 1, 0)
    rows, thresholds = two_exits(sure, early, full, np.ones(n, int), np.arange(n)), np.array([0.5, 0.7, 0.92, 0.99, 1])
    for goal in ({"max_loss": 1.0, "sure": 70.0}, {"max_loss": 1.0}):
        assert walk(ExitRule(2), rows, goal, [0, 1], thresholds)[0] == 0.99
    assert walk(ExitRule(2), rows, {"max_loss": 20.0, "sure": 70.0}, [0, 1], thresholds)[0] == 0.5


def test_with_speed_judges_stop_at_the_slowest_threshold_that_is_fast_enough():
    rows, thresholds = draw(np.random.default_rng(0), 2000), np.array([0.5, 0.6, 0.7, 0.8, 1.0])
    for speed, threshold in ((0, 0.5), (0.3, 0.6), (0.5, 0.7), (0.99, 0.8), (1, 1)):
        assert walk(ExitRule(2), rows, {"speed": speed}, [0, 1], thresholds)[0] == threshold
    assert walk(ExitRule(2), rows, {"speed": 0.5}, [1], np.ones(1)) == (1, 1, pytest.approx(86, abs=2))


@pytest.mark.parametrize("metric", ["accuracy", "agreement", "matthews"])
def test_all_can_be_lost_where_all_may_be_lost(metric):
    validation = draw(np.random.default_rng(0), 100)._replace(metric=metric)
    worse = validation._replace(logits=validation.logits * torch.tensor([-1.0, 1.0])[:, None, None])
    for limit in (200.0, 100.0)[: 1 if metric == "matthews" else 2]:
        point = point_of(worse, {"max_loss": limit, "sure": 99.0})
        assert point["speedup_ratio"] == validation.exits.costs()[0]
        assert point["threshold"] > 0.5  # so that a text without a known word goes on


def test_exits_that_cost_more_than_they_give_are_not_asked():
    """The exits after layers 1 and 3 guess."""
    rows = draw(np.random.default_rng(0), 1000)
    guess = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    logits = torch.stack([guess, rows.logits[0], guess, rows.logits[1]])
    validation = rows._replace(logits=logits, exits=Exits((1, 2, 3, 6), 6, "branch"))
    for goal in ({"max_loss": 1.0, "sure": 70.0}, {"max_change": 3.0, "sure": 90.0}, {"speed": 0.6}):
        point = point_of(validation, goal)
        assert point["asked_exits"] == [2, 6]
        assert point["speedup_ratio"] < 0.95
        assert point_of(validation, goal, asked=[1, 2, 3, 6])["asked_exits"] == [1, 2, 3, 6]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lte", [False, True])
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("metric", ["accuracy", "matthews", "agreement"])
def test_all_that_is_stated_is_of_the_judges(goal, metric, lte):
    cases = [("sweet", (1, 2, 4), 120), ("branch", (1, 2, 4), 120), ("mm", (1, 2, 4), 120), ("sweet", (4,), 40)]
    for method, layers, N in [*cases, ("branch", (2, 4), 2), ("sweet", (4,), 1)]:
        validation = random_validation(3, layers, N, 2, method, metric, lte)
        if metric == "agreement":
            validation = validation._replace(labels=validation.logits[-1].argmax(-1))
        sides = deal(validation)
        rule, point = operating_point(validation, goal, sides)
        judges = validation.take(sides.judging if N > 1 else [0])
        exits = [layers.index(n) for n in point["asked_exits"]]
        _, (answers,), (costs,) = judges.decide_at(rule, exits, [point["threshold"]])
        assert point["score"] == pytest.approx(operating.score(answers, judges.labels.numpy(), metric))
        assert point["loss"] == pytest.approx(point["full_depth_score"] - point["score"])
        assert point["speedup_ratio"] == pytest.approx(costs.mean())
        assert sum(point["per_class"]["support"]) == len(answers)
        assert point["reached"] == (point["speedup_ratio"] <= goal.get("speed", 2))
        assert "speed" in goal or point["speedup_ratio"] <= 1  # not slower than full depth
        for name, key in STATED.items():
            low, high = point[f"{name}_interval"]
            assert -200 <= low <= point[key] <= high <= 200
        if len(layers) == 1:
            assert (point["threshold"], point["loss"], point["loss_interval"]) == (1, 0, [0, 0])
            assert point["speedup_interval"] == [1, 1]
        if metric == "agreement":  # by definition
            assert (point["full_depth_score"], point["full_depth_interval"]) == (100, [100, 100])
        assert (point["choosing_texts"], point["judging_texts"]) == (-(-N // 4), N - -(-N // 4))


def test_intervals_are_as_wide_as_the_normal_ones():
    """Whether they hold is tried by tests/benchmark/draws.py."""
    rows = draw(np.random.default_rng(0), 2000)
    point, labels = stated(ExitRule(2), rows, [0, 1], 0.7), rows.labels.numpy()
    _, (answers,), (costs,) = rows.decide_at(ExitRule(2), [0, 1], [0.7])
    right, full = 100.0 * (answers == labels), 100.0 * (rows.logits[-1].argmax(-1).numpy() == labels)
    for name, values in (("score", right), ("full_depth", full), ("loss", full - right), ("speedup", costs)):
        low, high = point[f"{name}_interval"]
        assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.2)
        assert high - low == pytest.approx(2 * 1.96 * values.std() / 2000**0.5, rel=0.06)


def test_neither_the_order_of_rows_nor_repeats_of_a_text_make_a_difference():
    validation = draw(np.random.default_rng(4), 400)
    moved, repeated = (validation.take(np.random.default_rng(3).permutation(np.repeat(range(400), n))) for n in (1, 4))
    for goal in ({"max_loss": 3.0, "sure": 70.0}, {"max_change": 5.0, "sure": 90.0}, {"speed": 0.5}):
        ours = point_of(validation, goal)
        for rows in (moved, repeated):
            theirs, numbers = point_of(rows, goal), ours.keys() - {"goal", "per_class", "trained_rows", "threshold"}
            assert [key for key in numbers if ours[key] != pytest.approx(theirs[key], rel=1e-2, abs=2e-2)] == []
    weights = np.vstack(list(reweighted(validation.take([0, 0, 0, 0, 1, 1, 1, 1]), 1)))
    assert (weights[:, :4] == weights[:, :1]).all()
    assert (weights[:, 4] != weights[:, 0]).all()
    assert weights[:, -1].mean() == pytest.approx(4 * weights[:, 0].mean(), rel=0.1)  # a made-up text has four rows too


def test_what_falls_short_is_said_in_one_line():
    record = SimpleNamespace(metric="accuracy", text_columns=["text"], dev_data=None, dev_size=0.2)
    few, many = draw(np.random.default_rng(6), 40), draw(np.random.default_rng(6), 400)
    worse = many._replace(logits=many.logits * torch.tensor([-1.0, 1.0])[:, None, None])
    loss, change = {"max_loss": 1.0, "sure": 70.0}, {"max_change": 1.0, "sure": 90.0}
    for validation, goal, record_of, words in (
        (few, loss, {}, "30 texts judged, and 120 would do if no answer changed: about 800 labelled rows in --data"),
        (few, change, {"dev_size": 0.5}, "about 614 labelled rows in --data"),
        (few, change, {"metric": "agreement", "dev_data": "dev.csv"}, "about 307 validation rows"),
        (few, loss, {"metric": "matthews", "text_columns": None}, "241 would do if no answer changed: about 322 lab"),
        (few, {"max_loss": 0.0, "sure": 70.0}, {}, "no number of texts would do"),
        (few, {"max_loss": 1e-320, "sure": 70.0}, {}, "no number of texts would do"),
        (worse, change, {}, "too many answers change"),
    ):
        point = point_of(validation, goal)
        assert point["threshold"] == 1
        line = shortfall(point, SimpleNamespace(**vars(record) | record_of), [0, 6])
        assert (words in line, "\n" in line) == (True, False), line
    line = shortfall(point_of(many, {"speed": 0.5}, asked=[6]), record, [0, 6])
    assert line == "--speed 0.5 is out of reach; the fastest takes 100% of the layers"
    assert not shortfall(point_of(many, {"speed": 0.5}), record, [0, 6])
    assert not shortfall(point_of(worse, change), record, [6])  # nobody could leave
    point = point_of(many, {"speed": 0.0})
    assert (point["threshold"] > 0.5, point["speedup_ratio"], point["speedup_interval"][0]) == (True, 0, 0)
