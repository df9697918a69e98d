"""The picture of the tour, minisweet/tour/tour.ipynb. Letters: K exits, N texts."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

COLOURS = ("#FDE725", "#5EC962", "#21918C", "#3B528B")  # of the exits, the later the darker


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
