"""How often what evaluate.py states and promises comes true: draws of rows from an evaluated run with many of them.

    python -m tests.benchmark.draws RUN [--draws 2000]

The run's validation rows are the pool: all texts that there are, so that the truth of a threshold is known. Each draw
chooses an operating point on a few of them, with replacement. First: how often each 95% interval holds the truth of the
deployed threshold. Then: how often a promise is broken, beside a rule without a bound, and where texts stand several
times. It may be broken in 100 - S percent. Two standard errors of 2,000 draws are 1.0 at 95%, 1.3 at 90%, 2.0 at 70%.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from minisweet.data.tasks import stratified_split
from minisweet.evaluation.choice import Choice, choose
from minisweet.evaluation.operating import operating_point, statistics_of
from minisweet.evaluation.sweep import Validation, load_validation
from minisweet.runs.folders import read_evaluation, read_record

NAMES = ("score", "macro_f1", "full_depth", "loss", "speedup")
KEYS = {"full_depth": "full_depth_score", "speedup": "speedup_ratio"}  # where a statistic's key is not its name
GOALS = ({"speed": 0.5}, {"max_loss": 1.0, "sure": 70.0}, {"max_change": 3.0, "sure": 90.0})
SHARES = (0.17, 0.31, 0.53)  # of rows whose text stands there before


def take(pool: Validation, texts: np.ndarray, keys: np.ndarray | None = None) -> Validation:
    """These rows of the pool, from 0; without `keys` each is a text of its own."""
    return pool.take(texts)._replace(keys=torch.arange(len(texts)) if keys is None else torch.from_numpy(keys))


def coverage(pool: Validation, rows: int, wish: dict, draws: int) -> dict[str, float]:
    """In how many percent of draws each interval holds the truth, and full depth is deployed."""
    held, layers = dict.fromkeys([*NAMES, "full depth alone"], 0), list(pool.exits.layers)
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        rule, point = operating_point(take(pool, rng.integers(len(pool.labels), size=rows)), wish)
        choice = Choice(rule, [layers.index(n) for n in point["asked_exits"]], point["threshold"])
        truth = statistics_of(pool, *pool.decide(choice.rule, choice.places, choice.threshold))
        for name in NAMES:
            low, high = point[f"{name}_interval"]
            held[name] += low - 1e-9 <= truth[KEYS.get(name, name)] <= high + 1e-9
        held["full depth alone"] += point["threshold"] == 1
    return {name: round(100 * count / draws, 1) for name, count in held.items()}


def loss_of(pool: Validation, choice: Choice, weights: np.ndarray, is_change: bool) -> float:
    """Points lost, or percent changed, where each text of the pool comes with a probability: weights (N,)."""
    taken, _ = pool.decide(choice.rule, choice.places, choice.threshold)
    answers = pool.logits.argmax(-1).numpy()
    early, right = answers[taken, np.arange(len(taken))], answers[-1] if is_change else pool.labels.numpy()
    return 100 * float(weights @ ((answers[-1] == right).astype(float) - (early == right)))


def repeated(pool: Validation, rows: int, kind: float | str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Drawn texts (n,) and the probability of each of the pool's: (N,). `kind` says how texts repeat.

    "once": each row is drawn by itself. "four times": each stands four times. A number: so many texts that this share
    of rows repeats another's. "Zipf": by Zipf's law. Of the last two, 4 times as many rows are drawn and then split.
    """
    N = len(pool.labels)
    if kind in ("once", "four times"):
        times = 4 if kind == "four times" else 1
        return np.repeat(rng.integers(N, size=rows // times), times), np.full(N, 1 / N)
    weights = 1 / np.arange(1, N + 1)
    if kind != "Zipf":  # of x rows per text, the share 1 - (1 - exp(-x)) / x repeats another's
        x = np.linspace(0.01, 5, 1000)
        weights = np.arange(N) < 4 * rows / x[np.argmax(1 - (1 - np.exp(-x)) / x >= kind)]
    weights = rng.permutation(weights / weights.sum())
    texts = rng.choice(N, size=4 * rows, p=weights)
    _, dev = stratified_split(pool.labels.numpy()[texts], 0.25, int(rng.integers(2**31)), texts.tolist())
    return texts[dev], weights


def broken(pool: Validation, rows: int, wish: dict, draws: int, kind: float | str = "once") -> float:
    """In how many percent of draws more is lost, or changes, than was wished, and promised where it is "sure"."""
    is_change, count = "max_change" in wish, 0
    limit = wish["max_change" if is_change else "max_loss"]
    for seed in range(draws):
        texts, weights = repeated(pool, rows, kind, np.random.default_rng(seed))
        choice = choose(take(pool, texts, None if kind == "once" else texts), wish)
        count += loss_of(pool, choice, weights, is_change) > limit + 1e-9
    return 100 * count / draws


def main() -> None:
    """Print all of it for a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draws", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = load_validation(args.run, read_evaluation(args.run), read_record(args.run))
    for rows in (61, 239, 1001):
        for wish in GOALS:
            print(f"{rows} rows, {wish}: 95% intervals held in", coverage(pool, rows, wish, args.draws), flush=True)
    for rows in (240, 1000):
        without = broken(pool, rows, {"max_loss": 1.0}, args.draws)
        print(f"{rows} rows, at most 1 point lost, without a bound: broken in {without:.1f}%", flush=True)
        for sure in (70.0, 90.0, 95.0):
            wish = {"max_loss": 1.0, "sure": sure}
            print(f"{rows} rows, {wish}: broken in {broken(pool, rows, wish, args.draws):.1f}%", flush=True)
    for kind in ("once", *SHARES, "Zipf", "four times"):
        share = broken(pool, 300, GOALS[2], args.draws, kind)
        print(f"300 rows, {GOALS[2]}, texts that repeat: {kind}: broken in {share:.1f}%", flush=True)


if __name__ == "__main__":
    main()
