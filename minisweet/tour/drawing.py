"""The pictures of the tour, minisweet/tour/tour.ipynb. Each exit has one colour, the later the darker.

Letters: K exits, N texts.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

COLOURS = ("#FDE725", "#5EC962", "#21918C", "#3B528B")  # of the first exit, the second, ...


def where_texts_leave(taken: dict[float, np.ndarray], levels: dict[str, np.ndarray], exits: Sequence[int]) -> None:
    """One panel per threshold, with a bar per level: the percentage of its texts that leave at each exit.

    `taken` holds the exit (N,) that each text takes at a threshold, counted from 0; `levels` says which texts (N,) are
    on a level; `exits` are the exit layers (K,).
    """
    figure, axes = plt.subplots(1, len(taken), figsize=(10, 2.4), sharey=True)
    for axis, (threshold, exit_of_text) in zip(axes, taken.items(), strict=True):
        start = np.zeros(len(levels))
        for k, layer in enumerate(exits):
            share = np.array([100 * (exit_of_text[rows] == k).mean() for rows in levels.values()])
            axis.barh(list(levels), share, left=start, color=COLOURS[k], label=f"exit {layer}")
            start += share
        axis.set(title=f"threshold {threshold:g}", xlabel="percent of the texts")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(exits), frameon=False)
    plt.show()


def part_of(name: str, exits: Sequence[int]) -> tuple[str, int]:
    """The part of a model that a parameter is in: "layers" or "heads"; and the layer, 0 for the embeddings."""
    words = name.split(".")
    if words[0] == "encoder":
        return "layers", int(words[2]) + 1 if words[1] == "layers" else 0
    return words[0], exits[int(words[1])]


def owners(models: dict[str, dict[tuple[str, int], list[int]]], exits: Sequence[int]) -> None:
    """One panel per method: each part of its model, in the colours of the exits whose losses update it.

    For each method, `models` holds these exits by `part_of` the model.
    """
    rows = ("heads", "layers")
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 3.6), sharex=True)
    for axis, (method, parts) in zip(axes, models.items(), strict=True):
        for (row, n), updated_by in parts.items():
            y = rows.index(row)
            for i, layer in enumerate(updated_by):
                width = 0.8 / len(updated_by)
                axis.barh(y, width, 0.7, n - 0.4 + i * width, color=COLOURS[exits.index(layer)])
            axis.barh(y, 0.8, 0.7, n - 0.4, color="none", edgecolor="0.3")
        axis.set(title=method, ylim=(1.6, -0.6), yticks=(0, 1), yticklabels=rows)
    layers = range(1, 1 + exits[-1])
    axes[-1].set(xticks=[0, *layers], xticklabels=["embeddings", *layers], xlabel="layer", xlim=(-0.6, 0.6 + exits[-1]))
    patches = [Patch(color=colour, label=f"loss of exit {n}") for n, colour in zip(exits, COLOURS, strict=False)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(exits), frameon=False)
    plt.show()
