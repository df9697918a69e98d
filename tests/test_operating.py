"""The operating point: the choice of a threshold and of exits, what is stated of it, and what is promised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.adaptive import ExitRule, Exits
from minisweet.evaluation.choice import Candidates, best, candidates, certifying_rows, choose, deployed_threshold
from minisweet.evaluation.metrics import score, scores_of
from minisweet.evaluation.operating import operating_point, shortfall, statistics_of
from minisweet.evaluation.sweep import Validation, text_keys

WISHES = ({"speed": 0.5}, {"max_loss": 2.0, "sure": 70.0}, {"max_change": 10.0, "sure": 80.0})
STATED = {"score": "score", "macro_f1": "macro_f1", "full_depth": "full_depth_score", "loss": "loss"}
STATED |= {"speedup": "speedup_ratio"}


def random_validation(seed: int, layers: tuple, N: int, C: int = 2, method="sweet", metric="accuracy", lte=False):
    """Logits with many ties, so that confidences coincide."""
    generator, K = torch.Generator().manual_seed(seed), len(layers)
    logits = (torch.randn(K, N, C, generator=generator) * 2).round()
    labels = torch.randint(0, C, (N,), generator=generator)
    certainty = torch.rand(K, N, generator=generator) if lte else None
    keys = text_keys([f"text {n}" for n in range(N)])
    return Validation(logits, certainty, labels, keys, metric, Exits(layers, layers[-1], method))


def draw(rng: np.random.Generator, N: int) -> Validation:
    """Rows of exits 0 and 6. The first is sure of each by a random number, and right the more often the surer it is.

    Full depth is right on 86%. Of the rows that are sure by 1/2 + x the first exit changes (1 - 2x) 2/5.
    """
    sure, labels = rng.uniform(0.5, 1, N), rng.integers(0, 2, N)
    full = np.where(rng.random(N) < 0.86, labels, 1 - labels)
    early = np.where(rng.random(N) < 0.8 * (1 - sure), 1 - full, full)
    logits = np.stack([np.log(sure / (1 - sure))[:, None] * np.eye(2)[early], 2 * np.eye(2)[full]])
    keys, exits = torch.from_numpy(rng.permutation(10 * N)[:N]), Exits((0, 6), 6, "branch")
    return Validation(torch.from_numpy(logits).float(), None, torch.from_numpy(labels), keys, "accuracy", exits)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.sampled_from([(3,), (0, 3), (1, 2, 3), (0, 1, 2, 4)]),
    N=st.integers(1, 30),
    C=st.integers(2, 4),
    method=st.sampled_from(["sweet", "mm", "branch"]),
    metric=st.sampled_from(["accuracy", "matthews"]),
)
def test_every_candidate_gives_what_decisions_give(seed, layers, N, C, method, metric):
    validation, rule = random_validation(seed, layers, N, C, method, metric), ExitRule(C)
    places = sorted({*np.random.default_rng(seed).integers(len(layers), size=2).tolist(), len(layers) - 1})
    there, predictions = candidates(rule, validation, places), validation.logits.argmax(-1).numpy()
    assert there.thresholds[-1] == 1
    for place, threshold in enumerate(there.thresholds):
        for deployed in (threshold, deployed_threshold(there.thresholds, place, rule.lowest)):
            taken, costs = validation.decide(rule, places, deployed)
            assert set(taken) <= set(places)
            answers = np.stack([predictions[-1], predictions[taken, np.arange(N)]])
            scores = score(answers, validation.labels.numpy(), metric)
            assert scores_of(there.counts[..., place], metric) == pytest.approx(tuple(scores))
            assert there.ratios[place] == pytest.approx(costs.mean())
            asked = Exits([layers[place] for place in places], layers[-1], method)
            assert costs.tolist() == [asked.costs(deployed)[places.index(k)] for k in taken]


def candidates_of(ratios: list, lost_and_won: list) -> Candidates:
    """100 rows at each threshold, of which full depth alone has some right, and early exit alone others."""
    counts = np.zeros((2, 2, 2, len(ratios)))
    for m, (lost, won) in enumerate(lost_and_won):
        counts[1, 1, :, m], counts[1, 0, :, m] = (lost, 85 - lost), (15 - won, won)
    return Candidates(np.linspace(0.5, 1, len(ratios)), np.array(ratios), counts)


def test_a_wish_takes_the_fastest_or_the_best_that_grants_it():
    there = candidates_of([0.2, 0.4, 0.6, 1], [(7, 2), (5, 3), (2, 3), (0, 0)])  # scores 80, 83, 86, 85

    def place(metric="accuracy", **wish):
        found, (missed, *_) = best(there, metric, wish)
        return (found, not missed)

    assert place(speed=0.5) == (1, True)
    assert place(speed=1) == (2, True)
    assert place(speed=0.1) == (0, False)  # nothing is so fast: the fastest there is
    assert place(max_loss=50) == (0, True)
    assert place(max_loss=2) == (1, True)
    assert place(max_loss=50, sure=90) == (0, True)
    assert [place(max_loss=limit, sure=70)[0] for limit in (0, 2, 5, 9)] == [3, 2, 1, 0]
    assert [place(max_loss=6, sure=sure)[0] for sure in (50, 70, 99)] == [0, 1, 3]
    there = candidates_of([0.2, 0.4, 0.6, 1], [(9, 0), (8, 0), (5, 0), (0, 0)])
    # P(X <= 5) is 0.058 of a binomial with 100 draws and 0.1, and P(X <= 8) 0.32
    assert place("agreement", max_change=10, sure=90) == (2, True)
    assert place("agreement", max_change=10, sure=60) == (1, True)
    assert place("agreement", max_change=5, sure=90) == (3, True)


def test_what_is_passed_after_a_failure_does_not_count():
    there = candidates_of([0.2, 0.4, 0.6, 1], [(0, 0), (30, 0), (0, 0), (0, 0)])
    for metric, wish in (("accuracy", {"max_loss": 5.0, "sure": 70}), ("agreement", {"max_change": 5.0, "sure": 90})):
        assert best(there, metric, wish)[0] == 2
        assert best(there, metric, {name: value for name, value in wish.items() if name != "sure"})[0] == 0


def test_a_deployed_threshold_lies_midway_to_the_next_lower_confidence():
    thresholds = np.array([0.6, 0.7, 0.8, 1.0])
    assert [deployed_threshold(thresholds, place, 0.5) for place in range(4)] == [0.5, pytest.approx(0.65), 0.75, 1]
    assert deployed_threshold(np.array([1.0]), 0, 0.5) == 1
    close = np.array([0.7, np.nextafter(np.float32(0.7), np.float32(1)), 1], dtype=np.float64)
    assert np.float32(0.7) < np.float32(deployed_threshold(close, 1, 0.5)) <= np.float32(close[1])


def test_exits_that_cost_more_than_they_give_are_not_asked():
    """The exits after layers 1 and 3 guess."""
    rows = draw(np.random.default_rng(0), 1000)
    guess = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    logits = torch.stack([guess, rows.logits[0], guess, rows.logits[1]])
    validation = rows._replace(logits=logits, exits=Exits((1, 2, 3, 6), 6, "branch"))
    for wish in ({"max_loss": 1.0, "sure": 70.0}, {"max_change": 3.0, "sure": 90.0}, {"speed": 0.6}):
        _, point = operating_point(validation, wish)
        assert point["asked_exits"] == [2, 6]
        assert point["speedup_ratio"] < 0.95
        _, given = operating_point(validation, wish, asked=[1, 2, 3, 6])
        assert given["asked_exits"] == [1, 2, 3, 6]
    assert choose(validation, {"max_loss": -1.0}).places == [3]  # nothing helps


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lte", [False, True])
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("metric", ["accuracy", "matthews", "agreement"])
def test_an_operating_point_tells_of_itself(wish, metric, lte):
    cases = [("sweet", (1, 2, 4), 120), ("branch", (1, 2, 4), 120), ("mm", (1, 2, 4), 120), ("sweet", (4,), 40)]
    for method, layers, N in [*cases, ("branch", (2, 4), 2), ("sweet", (4,), 1)]:
        validation = random_validation(3, layers, N, 2, method, metric, lte)
        if metric == "agreement":
            validation = validation._replace(labels=validation.logits[-1].argmax(-1))
        rule, point = operating_point(validation, wish)
        assert point["loss"] == pytest.approx(point["full_depth_score"] - point["score"])
        for name, key in STATED.items():
            low, high = point[f"{name}_interval"]
            assert -200 <= low <= high <= 200
            assert low - 1e-9 <= point[key] <= high + 1e-9 or name == "macro_f1"
        assert point["asked_exits"][-1] == layers[-1]
        places = [layers.index(n) for n in point["asked_exits"]]
        taken, costs = validation.decide(rule, places, point["threshold"])
        assert point["speedup_ratio"] == pytest.approx(costs.mean())
        if len(layers) == 1:
            assert (point["threshold"], point["loss"], point["loss_interval"]) == (1, 0, [0, 0])
        if "sure" in wish:
            _, rows = certifying_rows(validation)
            assert point["certified_rows"] == point["certified_texts"] == point["effective_rows"] == len(rows)
            assert len(rows) == N - -(-N // 4)
            assert point["trained_rows"] is None
        if "max_change" in wish:
            answers = validation.logits.argmax(-1).numpy()
            changed = answers[taken, np.arange(N)] != answers[-1]
            assert point["certified_changes"] == changed[rows].sum()


def test_what_is_stated_had_no_say_in_the_choice():
    """Each fold's rows are decided by what the others choose."""
    validation, taken = draw(np.random.default_rng(1), 200), np.empty(200, dtype=int)
    _, point = operating_point(validation, {"speed": 0.5})
    for others, rows in validation.folds():
        choice = choose(validation.take(others), {"speed": 0.5})
        taken[rows] = validation.decide(choice.rule, choice.places, choice.threshold)[0][rows]
    assert point["score"] == statistics_of(validation, taken, np.ones(200))["score"]


@pytest.mark.parametrize("metric", ["accuracy", "agreement"])
def test_the_order_of_rows_makes_no_difference(metric):
    validation = draw(np.random.default_rng(2), 150)._replace(metric=metric)
    moved = validation.take(np.random.default_rng(3).permutation(150))
    for wish in WISHES:
        ours, theirs = (operating_point(rows, wish)[1] for rows in (validation, moved))
        for key in ours.keys() - {"wish"}:
            assert ours[key] == pytest.approx(theirs[key]), key


def test_equal_texts_are_one_witness():
    validation = draw(np.random.default_rng(4), 400)
    four_times = validation.take(np.repeat(np.arange(400), 4))
    for wish in ({"max_loss": 3.0, "sure": 70.0}, {"max_change": 5.0, "sure": 90.0}, {"speed": 0.5}):
        (_, once), (_, often) = (operating_point(rows, wish) for rows in (validation, four_times))
        for key in once.keys() - {"wish", "certified_rows", "certified_changes", "threshold", "trained_rows"}:
            assert once[key] == pytest.approx(often[key], rel=1e-3, abs=1e-3), key
        if "sure" in wish:
            assert often["certified_rows"] == 4 * once["certified_rows"]
    assert operating_point(four_times.take(np.arange(8)), WISHES[2])[1]["effective_rows"] == 1
    assert validation.take([0, 0, 0, 1, 2]).effective_rows() == 25 / (9 + 1 + 1)


def test_texts_that_were_trained_on_certify_nothing():
    validation, wish = draw(np.random.default_rng(5), 300), {"max_change": 5.0, "sure": 90.0}
    digests = [f"{key % 2**64:016x}" for key in validation.keys.tolist()]
    fitted, rows = certifying_rows(validation)
    assert (len(fitted), len(rows)) == (75, 225)
    _, none = operating_point(validation, wish, trained=["00" * 8, "ff" * 8])
    assert (none["trained_rows"], none["certified_rows"]) == (0, 225)
    some = [digests[row] for row in [*rows[:100], *fitted]]
    _, point = operating_point(validation, wish, trained=some)
    assert (point["trained_rows"], point["certified_rows"], point["certified_texts"]) == (100, 125, 125)
    # Nor does a fold choose on them, whose wish has no "sure". Of steady rows nothing changes.
    steady = np.flatnonzero(validation.logits[-1].argmax(-1) == validation.logits[0].argmax(-1))
    fold = choose(validation, {"max_change": 5.0}, None, [digests[row] for row in steady])
    assert fold.threshold > choose(validation, {"max_change": 5.0}).threshold
    assert {*fold.certifying} == {*range(300)} - {*steady}


def test_what_falls_short_is_said_in_one_line():
    validation = draw(np.random.default_rng(6), 40)
    for wish, words in (
        ({"max_change": 1.0, "sure": 90.0}, "230 rows that certify would do if no answer changed, and 30 are here"),
        ({"max_loss": 0.0, "sure": 70.0}, "no number of rows would do"),
    ):
        _, point = operating_point(validation, wish)
        assert point["threshold"] == 1
        assert shortfall(point).endswith(f": nothing faster than full depth can be promised; {words}")
    validation = draw(np.random.default_rng(6), 400)
    worse = validation._replace(logits=validation.logits * torch.tensor([-1.0, 1.0])[:, None, None])
    assert "too many answers change" in shortfall(operating_point(worse, {"max_change": 1.0, "sure": 90.0})[1])
    _, point = operating_point(validation, {"speed": 0.5}, asked=[6])
    assert shortfall(point) == "--speed 0.5 is out of reach; the fastest takes 1.000 of the layers"
    assert not shortfall(operating_point(validation, {"speed": 0.5})[1])
    _, point = operating_point(validation, {"speed": 0.0})
    assert (point["threshold"], point["speedup_ratio"], point["speedup_interval"]) == (0.5, 0, [0, 0])


def test_rows_of_confidence_1_leave_at_the_highest_threshold_below():
    """Of 300 rows the first exit is certain of 250, which float32 rounds to 1, and wrong on the others."""
    labels, wrong = torch.zeros(300, dtype=torch.int64), torch.arange(300) >= 250
    margins = torch.stack([torch.where(wrong, -0.3, 40.0), torch.full((300,), 40.0)])
    logits = torch.stack([margins, torch.zeros(2, 300)], dim=-1)
    validation = Validation(logits, None, labels, torch.arange(300), "accuracy", Exits((1, 2), 2, "sweet"))
    rule = ExitRule(2)  # temperatures would lower the confidence
    there = candidates(rule, validation, [0, 1])
    for wish in ({"max_loss": 1.0}, {"speed": 0.7}):
        threshold = deployed_threshold(there.thresholds, best(there, "accuracy", wish)[0], 0.5)
        assert validation.decide(rule, [0, 1], threshold)[0].tolist() == wrong.tolist()


@pytest.mark.parametrize("wish", [{"speed": 0.6}, {"max_loss": 3.0, "sure": 70.0}, {"max_change": 5.0, "sure": 90.0}])
def test_what_is_stated_and_promised_comes_true(wish):
    """tests/benchmark/draws.py draws more, from real runs."""
    rng, draws = np.random.default_rng(7), 60
    world, held, broken, faster = draw(rng, 20_000), dict.fromkeys(STATED, 0), 0, 0
    for _ in range(draws):
        rule, point = operating_point(draw(rng, 239), wish)
        taken, costs = world.decide(rule, [(0, 6).index(n) for n in point["asked_exits"]], point["threshold"])
        truth = statistics_of(world, taken, costs)
        for name, key in STATED.items():
            low, high = point[f"{name}_interval"]
            held[name] += low - 0.01 <= truth[key] <= high + 0.01
        answers = world.logits.argmax(-1).numpy()
        changed = 100 * (answers[taken, np.arange(len(taken))] != answers[-1]).mean()
        broken += truth["loss"] > wish.get("max_loss", 100) or changed > wish.get("max_change", 100)
        faster += point["speedup_ratio"] < 0.9
    assert min(held.values()) > 0.88 * draws
    assert broken <= draws * (100 - wish.get("sure", 100)) / 100 + 2 * (draws * 0.09) ** 0.5
    assert faster > 0.6 * draws
