"""What is deployed: who chooses and who judges, where the judges stop, and what is promised and stated of new text."""

import math
from argparse import Namespace
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minisweet.classifier.cascade import Answers, answers_of
from minisweet.classifier.promise import (
    Goal,
    OperatingPoint,
    choose,
    classification_report,
    fixed_sequence,
    how_sure,
    measure,
    thresholds_to_try,
    wilson,
)
from minisweet.classifier.report import promise_of, summary, what_is_promised
from minisweet.classifier.split import CHOOSES, JUDGES, deal_roles

GOAL = Goal()


class Rows(NamedTuple):
    """N validation rows of two exits."""

    logits: Tensor  # (2, N, C)
    labels: np.ndarray  # (N,), like the next ones
    keys: np.ndarray
    units: np.ndarray

    def take(self, rows: np.ndarray) -> "Rows":
        return Rows(self.logits[:, rows], *(part[rows] for part in self[1:]))

    def sides(self) -> list[np.ndarray]:
        """The rows that choose, and those that judge."""
        roles = deal_roles(self.keys, self.units, self.labels)
        return [np.flatnonzero(roles == role) for role in (CHOOSES, JUDGES)]

    def choose(self, goal: Goal, combines: bool = False) -> OperatingPoint:
        return choose(*self[:3], deal_roles(self.keys, self.units, self.labels), goal, combines)


def plain(rows: Rows) -> Answers:
    """The answers of calibrated logits."""
    return answers_of(rows.logits, (1.0, 1.0, 0.0), rows.labels, rows.keys)


def two_exits(sure, early, full, labels) -> Rows:
    """Both exits by what they answer, and how sure the first one is of it: (N,) each, of two classes."""
    logits = np.stack([np.log(sure / (1 - sure))[:, None] * np.eye(2)[early], 2 * np.eye(2)[full]])
    keys = np.random.default_rng(0).permutation(len(labels))
    return Rows(torch.from_numpy(logits).float(), np.asarray(labels), keys, keys)


def draw(seed: int, N: int) -> Rows:
    """Full depth is right on 86%. Where the first exit is sure by s, it changes 0.8 (1 - s) of full depth's answers."""
    rng = np.random.default_rng(seed)
    sure, labels = rng.uniform(0.5, 1, N), rng.integers(0, 2, N)
    full = np.where(rng.random(N) < 0.86, labels, 1 - labels)
    return two_exits(sure, np.where(rng.random(N) < 0.8 * (1 - sure), 1 - full, full), full, labels)


def without_labels(rows: Rows, has_label: np.ndarray) -> Rows:
    """The rows, of which some alone (N,) keep their label."""
    return rows._replace(labels=np.where(has_label, rows.labels, -1))


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0.001, 0.999))
def test_how_sure_texts_are_is_the_exact_binomial_test(n, part, p):
    lost = [0, int(part * n), n]
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    assert how_sure(n, lost, p) == pytest.approx([1 - sum(chances[: k + 1]) for k in lost], abs=1e-9)
    assert how_sure(10**6, [29_800], 0.03) == pytest.approx(NormalDist().cdf(199.5 / 29_100**0.5), abs=1e-3)


@given(st.integers(0, 10**6), st.sampled_from([20, 100, 400]), st.sampled_from([1.0, 5.0, 20.0]), st.integers(50, 99))
def test_judges_stop_before_the_first_threshold_that_fails_and_never_earlier_with_more_labels(seed, N, limit, sure):
    """Each answer that early exit changes counts as lost, unless a label says that full depth was wrong."""
    rng, rows, stops = np.random.default_rng(seed), draw(seed, N), []
    confidence, early, full, labels = (np.asarray(part) for part in plain(rows)[:4])
    place, thresholds = rng.permutation(N), np.r_[np.sort(rng.uniform(0.5, 1, 12)), 1]
    for known in (N // 4, N // 2, N):  # whoever chose which ones
        is_lost = (early != full) & ~((place < known) & (full != labels))
        expected = 1.0
        for threshold in thresholds[-2::-1]:  # downwards
            if how_sure(N, [(is_lost & (confidence >= np.float32(threshold))).sum()], limit / 100) < sure / 100:
                break
            expected = threshold
        some = without_labels(rows, place < known)
        assert fixed_sequence(plain(some), Goal(max_lost=limit, sure=sure), thresholds) == expected
        counted, lost = (measure(0.5, plain(these))["lost"] for these in (some, rows))
        assert lost <= counted == pytest.approx(100 * is_lost.mean())
        stops.append(expected)
    assert stops == sorted(stops, reverse=True)


def test_promises_are_broken_in_at_most_one_of_ten_draws():
    broken = 0
    for seed in range(200):
        point = draw(seed, 400).choose(GOAL)
        odds = (point.threshold / max(1 - point.threshold, 1e-9)) ** point.temperatures[0]
        broken += 0.86 * 0.8 / (1 + odds) ** 2 > 0.03  # how many are lost in the long run, see `draw`
    assert 0 < broken <= 20 + 2 * (200 * 0.1 * 0.9) ** 0.5


def test_a_text_counts_once_and_is_lost_if_any_of_its_rows_is():
    validation, rng = draw(0, 300), np.random.default_rng(0)
    assert validation.choose(GOAL) == validation.take(rng.permutation(300)).choose(GOAL)
    uneven = validation.take(np.arange(300).repeat(rng.integers(1, 9, 300)))
    ours, theirs = (measure(0.7, plain(rows)) for rows in (validation, uneven))
    assert all(theirs[key] == pytest.approx(ours[key]) for key in theirs.keys() - {"majority", "macro_f1", "per_class"})
    both = two_exits(np.full(2, 0.9), np.array([0, 0]), np.array([1, 1]), [0, 1])._replace(keys=np.zeros(2, int))
    point = measure(0.7, plain(both))  # a text under two labels, of which one is lost
    assert (point["judging_texts"], point["lost"], point["score"]) == (1, 100, 50)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_choosers_and_judges_are_dealt_by_a_hash_and_a_group_judges_by_one_text(is_grouped):
    """Whatever the labels are, how often a text is there, and in which order. Rows without a label are dealt apart."""
    rows, rng = draw(5, 300), np.random.default_rng(0)
    groups = rng.integers(0, 80, 300) if is_grouped else np.arange(300)
    rows = rows._replace(units=rows.keys[groups])  # group n goes by the key of row n
    rows.labels[groups % 2 == 0] = -1

    def sides(rows: Rows) -> list[set[int]]:
        return [{*rows.keys[side].tolist()} for side in rows.sides()]

    choosing, judging = sides(rows)
    others = rows._replace(labels=np.where(rows.labels < 0, -1, 1 - rows.labels))
    for same in (others, rows.take(rng.permutation(300).repeat(rng.integers(1, 4, 300)))):
        assert sides(same) == [choosing, judging]
    group_of = dict(zip(rows.keys.tolist(), groups.tolist(), strict=True))
    choosing, of_judges = {group_of[key] for key in choosing}, [group_of[key] for key in judging]
    assert len({*of_judges}) == len(of_judges)
    assert (choosing | {*of_judges}, choosing & {*of_judges}) == ({*groups.tolist()}, set())
    for rest in (0, 1):
        there = {n for n in groups.tolist() if n % 2 == rest}
        assert len(choosing & there) == math.ceil(len(there) / 4)


@pytest.mark.parametrize(("labelled", "all_judge"), [(0, 1), (200, 1), (300, 0), (1600, 0)])
def test_who_judges_follows_from_two_counts_alone(monkeypatch, labelled, all_judge):
    """Of 2,000 texts. With few labels all judge."""
    rows = without_labels(draw(7, 2000), np.arange(2000) < labelled)
    choosing, judging = rows.sides()
    strange = draw(8, 2000)  # with the same keys
    strange.logits[:, choosing], strange.labels[choosing] = rows.logits[:, choosing], rows.labels[choosing]
    strange.labels[labelled:] = -1
    tried, place = [], "minisweet.classifier.promise.fixed_sequence"
    monkeypatch.setattr(place, lambda judges, _, thresholds: tried.append((judges.keys, thresholds)) or 1.0)
    points = [its.choose(GOAL) for its in (rows, strange)]  # whatever the judges are
    assert np.array_equal(tried[0][1], tried[1][1])
    assert {*tried[0][0]} <= {*rows.keys[judging]}
    for point in points:
        found = (point.choosing_texts, point.judging_texts, point.labelled_judges)
        assert found == (*(sum((side < labelled) | all_judge) for side in (choosing, judging)), sum(judging < labelled))
        assert point.temperatures == points[0].temperatures


def test_without_a_label_full_depth_may_be_wrong_and_the_interval_says_so():
    rows = draw(7, 2000)
    ends = [some.choose(GOAL).lost_interval[0] for some in (rows, without_labels(rows, np.arange(2000) < 200))]
    assert ends[0] > 0 == ends[1]


@pytest.mark.parametrize("N", [800, 160])
def test_where_exit_0_has_a_say_full_depth_is_everywhere_the_rules(N):
    rng, labels = np.random.default_rng(13), np.arange(N) % 3
    logits = torch.from_numpy(rng.normal(size=(2, N, 3)) + 1.5 * np.eye(3)[labels]).float()
    rows = Rows(logits, labels, keys := rng.permutation(N), keys)
    point, judges = rows.choose(GOAL, combines=True), rows.take(rows.sides()[1])
    first, model = judges.logits[0] / point.temperatures[0], judges.logits[1]
    said = model / point.temperatures[1] + point.weights[1] * first
    full, early = said.argmax(-1).numpy(), first.argmax(-1).numpy()
    stays = (first.softmax(-1).amax(-1) < np.float32(point.threshold)).numpy() | (point.threshold == 1)
    early = np.where(stays, full, early)
    assert (point.weights[0], point.weights[1] > 0.2) == (0, True)
    assert point.full_depth == pytest.approx(100 * (full == judges.labels).mean())
    assert point.full_depth > 100 * (model.argmax(-1).numpy() == judges.labels).mean()
    assert point.score == pytest.approx(100 * (early == judges.labels).mean())
    assert point.lost == pytest.approx(100 * ((full == judges.labels) & (early != full)).mean())
    assert point.share == pytest.approx(stays.mean())
    assert point.exit_0 == pytest.approx(100 * (first.argmax(-1).numpy() == judges.labels).mean())


def test_thresholds_to_try_end_where_they_should():
    thresholds = thresholds_to_try(plain(draw(0, 200)))
    assert thresholds[0] > 0.5  # texts without a known word stay
    assert thresholds[-1] == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("goal", [GOAL, Goal(max_lost=40.0, sure=50.0)])
def test_intervals_hold_what_is_stated(goal, has_labels):
    for N in (120, 40, 2):
        point = without_labels(draw(3, N), np.full(N, has_labels)).choose(goal)
        assert point.share <= 1  # not slower than full depth
        for name in ("score", "full_depth", "exit_0", "lost", "share"):
            ends = getattr(point, f"{name}_interval")
            assert (ends is None) == (not has_labels and name in ("score", "full_depth", "exit_0"))
            assert ends is None or 0 <= ends[0] <= getattr(point, name) <= ends[1] <= 100


@pytest.mark.parametrize(("n", "p"), [(76, 0.01), (240, 0.02), (240, 0.9), (1000, 0.5)])
def test_intervals_are_as_wide_as_theory_says(n, p):
    low, high = np.transpose([wilson(np.arange(n) < k) for k in range(n + 1)])
    chances = -np.diff([1, *how_sure(n, np.arange(n + 1), p)])
    assert 0.94 < chances[(low <= 100 * p) & (100 * p <= high)].sum() < 0.995
    rows = draw(n, 4000)
    low, high = measure(0.7, plain(rows))["share_interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.4**0.5 * 0.6**0.5 / 4000**0.5, rel=0.05)  # 6 of 10 leave


def test_words_of_a_promise():
    point = replace(draw(0, 1000).choose(GOAL), threshold=0.8, share=0.5, full_depth=73.7, score=75.2)
    point = replace(point, judging_texts=744, labelled_judges=100, lost=1400 / 744)
    seen = "On 744 of your texts that the model had not seen, early exit lost at most 14 answers that full depth "
    seen += "had right."
    promised = " In the long run at most 3 in 100 new texts like these are lost, 90% sure."
    scores = " Of 100 labelled texts full depth got 73.7% right, early exit 75.2%."
    assert what_is_promised(point) == seen + promised + scores
    assert what_is_promised(replace(point, threshold=1.0)) == ""


def record_of(**changes) -> Namespace:
    """What words need of a run."""
    about = {"set_aside": 0.2, "rows_per_unit": [1.0, 1.0], "validation_rows": 80, "training_groups": []}
    return Namespace(**about | {"validation_groups": []} | changes)


def deployed(point: OperatingPoint) -> SimpleNamespace:
    return SimpleNamespace(threshold=point.threshold, precision=None)


def test_words_on_what_it_takes_count_rows_and_where_groups_judge_groups():
    point = replace(draw(0, 80).choose(GOAL), threshold=1.0, judging_texts=60, labelled_judges=60)
    words = "nothing faster than full depth can be promised: only 60 texts judged; it takes about "
    in_rows = "510 labelled rows if none is lost, 860 if one is, and 1,175 if two are"
    assert promise_of(deployed(point), point, record_of()) == words + in_rows
    in_groups = in_rows.replace("labelled rows", "groups of labelled rows")
    in_groups += " (at 1.7 rows a group, as here: 867, 1,462 and 1,998 rows)"
    grouped = record_of(training_groups=["a"], rows_per_unit=[1.7, 1.0])
    assert promise_of(deployed(point), point, grouped) == words + in_groups
    assert "102 labelled rows if none" in promise_of(deployed(point), point, record_of(set_aside=1.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share": 1.0}, "early exit saves nothing: more rows, texts without labels (--unlabelled) or a larger --max"),
        ({"share": 0.7}, "early exit saves only 30% of the layers: more rows, "),
        ({"share": 0.0}, "all texts leave at exit 0"),
        ({"full_depth_interval": [44.9, 63.2]}, "full depth may be no better than always answering the most frequent"),
        ({}, None),
    ],
)
def test_a_summary_warns_of_what_is_hardly_worth_it(changes, said):
    """The interval of full depth, and not its score, is compared with the most frequent label."""
    rows = draw(0, 1000)._replace(labels=(np.arange(1000) % 5 < 3).astype(int))
    point = replace(rows.choose(GOAL), share=0.6, full_depth=62.0, full_depth_interval=[61.0, 80.0])
    assert point.majority == pytest.approx(60, abs=3)
    point = replace(point, **changes)
    starts = "early exit saves", "all texts", "full depth may"
    told = [line for line in summary(deployed(point), point, record_of()) if line.startswith(starts)]
    assert [line.startswith(said) for line in told] == [True] * (said is not None)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_report_of_each_class_is_that_of_plain_loops(pairs):
    predictions, labels = np.array(pairs).T
    report = classification_report(predictions, labels, 5)
    for c in range(5):
        right = sum(p == t == c for p, t in pairs)
        predicted, support = int((predictions == c).sum()), int((labels == c).sum())
        assert report["support"][c] == support
        assert report["precision"][c] == pytest.approx(100 * right / predicted if predicted else 0)
        assert report["recall"][c] == pytest.approx(100 * right / support if support else 0)
        assert report["f1"][c] == pytest.approx(200 * right / (predicted + support) if predicted + support else 0)


def test_macro_f1_is_the_mean_over_the_classes_that_are_there_or_are_answered():
    labels, answers = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 3])
    rows = Answers(torch.ones(4), answers, answers, labels, labels >= 0, np.arange(4), num_labels=5)
    assert measure(0.5, rows)["macro_f1"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
