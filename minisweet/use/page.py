"""A page for looking at who leaves where: one HTML file, made from page.html and an evaluation's data.

The page decides by the confidences that stand in it, as `minisweet.adaptive.leaves` does: in float32, so that at each
of the evaluation's thresholds it counts what evaluation.json counts.
Dimension letters: C classes, K exits, N instances, P thresholds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, exit_costs, exits_taken
from minisweet.calibration import row_temperatures
from minisweet.data.tasks import score
from minisweet.files.safe import InputError, written_beside
from minisweet.use.plots import METRICS

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path,
    evaluation: dict,
    record: dict,
    sentences: Sequence[str | tuple[str, str]],
    logits: Tensor,
    certainty: Tensor | None,
    labels: Sequence[int] | None,
    difficulties: Sequence[str] | None = None,
) -> None:
    """Write the page, whole or not at all; what stands at `path` is replaced.

    Args:
        path: the HTML file.
        evaluation: what evaluation.json holds.
        record: what run.json holds: `model`, `labels` and `depth` are read.
        sentences: (N), texts or pairs of texts, in the order of the logits.
        logits: (K, N, C), those that were evaluated.
        certainty: (K or K-1, N) of learning-to-exit, else None.
        labels: (N), the right classes. None, or whatever is given where the metric is "agreement", shows agreement
            with full depth instead.
        difficulties: (N), of the toy task, or None.

    Raises:
        InputError: the evaluation counts other exits at its thresholds than these logits give.
    """
    predictions = logits.argmax(-1)  # (K, N)
    unlabelled = labels is None or evaluation["metric"] == "agreement"
    targets = predictions[-1] if unlabelled else torch.as_tensor(labels)  # (N,)
    if certainty is None:
        rule = ExitRule(logits.shape[-1], row_temperatures(logits, targets, evaluation["calibration"]))
    else:
        rule = ExitRule(logits.shape[-1], ranges=torch.tensor(evaluation["certainty_ranges"]))
    confidence, K = rule.confidences(logits, certainty), len(logits)  # (K, N)
    counts = [exits_taken(confidence, t, rule.lowest).bincount(minlength=K).tolist() for t in evaluation["thresholds"]]
    if counts != evaluation["exit_counts"]:
        raise InputError("evaluation.json: it counts other exits than these logits give; run evaluate.py again")
    cost_terms = (evaluation["exit_layers"], record["depth"], evaluation["method"])
    thresholds = slider_thresholds(evaluation, rule.lowest)
    scores, ratios = [], []  # (P)
    for threshold in thresholds:
        taken = exits_taken(confidence, threshold, rule.lowest)  # (N,)
        chosen = predictions.gather(0, taken[None])[0]
        scores.append(score(chosen.numpy(), targets.numpy(), evaluation["metric"]))
        ratios.append(float(np.array(exit_costs(*cost_terms, threshold))[taken.numpy()].mean()))  # Eq. 1
    levels = list(dict.fromkeys(evaluation.get("mean_exit_layers", difficulties or [])))  # in its order: easy first
    data = {
        "model": Path(record["model"]).name,
        "task": evaluation["task"],
        "method": evaluation["method"],
        "metric": METRICS.get(evaluation["metric"], evaluation["metric"]),
        "labels": list(record["labels"]),
        "exit_layers": list(evaluation["exit_layers"]),
        "depth": record["depth"],
        "exit_costs": exit_costs(*cost_terms),
        "exit_scores": evaluation["exit_scores"],
        "lowest": rule.lowest,
        "thresholds": thresholds,
        "scores": scores,
        "ratios": ratios,
        "operating_point": evaluation.get("operating_point"),
        "sentences": [text if isinstance(text, str) else list(text) for text in sentences],
        "predictions": predictions.tolist(),
        # Nine digits tell every float32 from its neighbours.
        "confidences": [[float(f"{value:.9g}") for value in row] for row in confidence.tolist()],
        "right": None if unlabelled else targets.tolist(),
        "levels": levels,
        "difficulties": None if difficulties is None else [levels.index(level) for level in difficulties],
    }
    # What "<" could begin, a tag or a comment, must not end the script element; json escapes all beyond ASCII.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    with written_beside(path) as partial:
        partial.write_text(before + text + after, encoding="utf-8")


def slider_thresholds(evaluation: dict, lowest: float) -> list[float]:
    """The evaluation's thresholds and its operating point as they are, and every hundredth between, in order."""
    exact = set(evaluation["thresholds"])
    if point := evaluation.get("operating_point"):
        exact.add(point["threshold"])
    known = np.array(sorted(exact))
    hundredths = (n / 100 for n in range(101) if n / 100 > lowest)
    return sorted(exact | {t for t in hundredths if np.abs(known - t).min() > 1e-9})
