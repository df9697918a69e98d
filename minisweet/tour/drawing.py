"""The pictures of the tour, minisweet/tour/tour.ipynb. Letter: K exits.

In all of them the first layer or exit is at the left or on top. An exit has one colour, and nothing else has it.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

EXITS = {0: "#E69F00", 1: "#FDE725", 2: "#5EC962", 3: "#21918C", 6: "#3B528B"}  # with layers: the later, the darker
ALL_TOKENS, CLS_ALONE = "0.72", "0.25"  # greys, since they are no exits


def who_leaves(shares: dict[str, dict[str, Sequence[float]]], exits: Sequence[int]) -> None:
    """For each title a panel, with a bar for each level: the percent (K,) of its sentences that leave at each exit."""
    figure, axes = plt.subplots(1, len(shares), figsize=(10, 2.4), sharey=True)
    for axis, (title, levels) in zip(axes, shares.items(), strict=True):
        start = np.zeros(len(levels))
        for layer, share in zip(exits, np.array(list(levels.values())).T, strict=True):
            axis.barh(list(levels), share, left=start, color=EXITS[layer], label=f"exit {layer}")
            start += share
        axis.set(title=title, xlabel="percent of its kind")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(exits), frameon=False)
    plt.show()


def part_of(name: str, exits: Sequence[int]) -> tuple[str, int]:
    """Where a parameter stands, by its name: "layers", "branches" or "heads", and the layer; the embeddings are 0."""
    words = name.split(".")
    if words[0] == "encoder":
        return "layers", int(words[2]) + 1 if words[1] == "layers" else 0
    return words[0], exits[int(words[1])]


def owners(norms: dict[str, dict[tuple[str, int], np.ndarray]], exits: Sequence[int]) -> None:
    """Each model as it stands, each part in the colours of the exits whose losses reach it.

    For each method and `part_of` a model: the norms (K,) of the gradients.
    """
    rows = [sorted({row for row, _ in parts}, key=["heads", "branches", "layers"].index) for parts in norms.values()]
    figure, axes = plt.subplots(len(norms), 1, figsize=(9, 5.2), height_ratios=list(map(len, rows)), sharex=True)
    for axis, (method, parts), lanes in zip(axes, norms.items(), rows, strict=True):
        for (row, n), values in parts.items():
            y, reached = lanes.index(row), [k for k in exits if values[exits.index(k)] > 0]
            for i, k in enumerate(reached):
                axis.barh(y, 0.8 / len(reached), 0.7, n - 0.4 + 0.8 * i / len(reached), color=EXITS[k])
            axis.barh(y, 0.8, 0.7, n - 0.4, color="none" if reached else "0.9", edgecolor="0.3")
        axis.set(title=method, ylim=(len(lanes) - 0.4, -0.6), yticks=range(len(lanes)), yticklabels=lanes)
    layers = range(1, 1 + exits[-1])
    axes[-1].set(xticks=[0, *layers], xticklabels=["words", *layers], xlabel="layer", xlim=(-0.6, layers[-1] + 0.6))
    patches = [Patch(color=EXITS[layer], label=f"loss of exit {layer}") for layer in exits]
    patches.append(Patch(facecolor="0.9", edgecolor="0.3", label="no loss: frozen"))
    figure.legend(handles=patches, loc="outside lower center", ncols=1 + len(exits), frameon=False)
    plt.show()


def way(ways: dict[str, list[tuple[str, int]]], exits: Sequence[int]) -> None:
    """One text on its way: for each title the layers that ran until an exit answered, and for how many tokens.

    A layer is called as in the model, "encoder.layers.0", "branches.1" or "models.2.encoder.layers.0". What stands
    before its number is its lane.
    """
    steps = {title: [(*name.rsplit(".", 1), tokens) for name, tokens in ran] for title, ran in ways.items()}
    heights = [len({lane for lane, *_ in ran}) for ran in steps.values()]
    figure, axes = plt.subplots(len(ways), 1, figsize=(9, 4.6), height_ratios=heights, sharex=True)
    for axis, (title, ran) in zip(axes, steps.items(), strict=True):
        # Branches are below, and [CLS] alone is drawn over all tokens.
        for lane, number, tokens in sorted(ran, key=lambda step: (step[0] == "branches", step[0], -step[2])):
            n = exits[int(number)] if lane == "branches" else int(number) + 1
            width, colour = (0.2, CLS_ALONE) if tokens == 1 else (0.8, ALL_TOKENS)
            axis.barh(lane, width, 0.6, n - 0.4, color=colour)
            axis.barh(lane, 0.8, 0.6, n - 0.4, color="none", edgecolor="0.7")
        axis.set(title=title, xlim=(0.4, exits[-1] + 0.6), xticks=range(1, 1 + exits[-1]))
        axis.invert_yaxis()
    axes[-1].set(xlabel="layer")
    told = {"the layer ran for all tokens": ALL_TOKENS, "for [CLS] alone": CLS_ALONE}
    patches = [Patch(color=colour, label=label) for label, colour in told.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, frameon=False)
    plt.show()
