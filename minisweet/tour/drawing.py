"""The pictures of the tour, minisweet/tour/tour.ipynb. Letters: K exits, N sentences.

In all of them the first layer or exit is at the left or on top. An exit has one colour, and nothing else has it.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from minisweet.adaptive import Exits

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


def reliability(sure: dict[str, Sequence[np.ndarray]], right: dict[str, np.ndarray], exits: Sequence[int]) -> None:
    """How often each exit is right, by its confidence, and how many sentences there are.

    For each title the exits' confidences (K, N), and for each exit who is right, (K, N).
    """
    figure, axes = plt.subplots(2, len(sure), figsize=(9, 4.2), sharex=True, sharey="row", height_ratios=(3, 1))
    edges = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.001])
    for (axis, below), (title, confidences) in zip(axes.T, sure.items(), strict=True):
        axis.plot([50, 100], [50, 100], color="0.7")
        for place, (layer, values, found) in enumerate(zip(exits, confidences, right, strict=True)):
            bins = [(low <= values) & (values < high) for low, high in zip(edges, edges[1:], strict=False)]
            points = [(100 * values[some].mean(), 100 * found[some].mean()) for some in bins if some.sum() >= 20]
            axis.plot(*zip(*points, strict=True), ".-", color=EXITS[layer], label=f"exit {layer}")
            starts = 100 * edges[:-1] + 100 * np.diff(edges) * (place + 0.5) / len(exits)
            below.bar(starts, [some.sum() for some in bins], 0.8, color=EXITS[layer])
        axis.set(title=title)
        below.set(xlabel="mean confidence, percent")
    axes[0, 0].set_ylabel("percent right")
    axes[1, 0].set_ylabel("sentences")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(exits), frameon=False)
    plt.show()


def way(ways: dict[str, list[tuple[str, int]]], exits: Sequence[int], stop: int, depth: int) -> None:
    """One text on its way: for each method the layers that ran until exit `stop` answered, and for how many tokens.

    A layer is called as in the model, "encoder.layers.0", "branches.1" or "models.2.encoder.layers.0".
    """
    titles = {"ee": "EE and SWEET", "mm": "Multi-Model", "branch": "branches"}
    lanes_of = {"ee": {"encoder": "all layers"}, "branch": {"encoder": "all layers", "branches": "branches"}}
    lanes_of["mm"] = {f"models.{k}": f"model {k + 1}" for k in range(exits.index(stop) + 1)}
    heights = [len(lanes_of[method]) for method in ways]
    figure, axes = plt.subplots(len(ways), 1, figsize=(9, 6.6), height_ratios=heights, sharex=True)
    for axis, (method, ran) in zip(axes, ways.items(), strict=True):
        lanes = list(lanes_of[method])
        costs = dict(zip((0, *exits), Exits((0, *exits), depth, method).costs(), strict=True))
        axis.text(0, 0, "words,\nexit 0", ha="center", va="center", bbox={"fc": "0.85", "ec": "0.3", "pad": 5})
        for y, lane in enumerate(lanes):
            for n in range(1, 1 + (depth if lane == "encoder" else stop if lane == "branches" else exits[y])):
                axis.barh(y, 0.8, 0.6, n - 0.4, color="none", edgecolor="0.8")
        full = set()
        for name, tokens in sorted(ran, key=lambda step: -step[1]):  # [CLS] alone is drawn over all tokens
            y = next(y for y, lane in enumerate(lanes) if name.startswith(lane))
            place = int(name.rpartition(".")[2])
            n = exits[place] if lanes[y] == "branches" else place + 1
            width, colour = (0.2, CLS_ALONE) if tokens == 1 else (0.8, ALL_TOKENS)
            axis.barh(y, width, 0.6, n - 0.4, color=colour)
            leaves = (name, tokens) == ran[-1]
            if tokens > 1:
                full.add((y, n))
            elif (y, n) not in full:
                counted = "1/6" if lanes[y] == "branches" and not leaves else "whole"
                axis.text(n + 0.1, y, f"counted\n{counted}", ha="center", va="center", fontsize=8)
            if leaves:
                axis.annotate("leaves here", (n + 0.4, y), (n + 0.65, y), va="center", arrowprops={"arrowstyle": "<-"})
        for n in (0, *exits[: exits.index(stop) + 1]):
            axis.text(n, len(lanes) - 0.5, f"exit {n}: {costs[n]:.2f}", ha="center", va="top")
        axis.set(title=f"{titles[method]}: leaves at exit {stop}, at a cost of {costs[stop]:.2f}", xlim=(-0.6, 6.6))
        axis.set_ylim(len(lanes) - 0.1, -0.6)
        axis.set_yticks(range(len(lanes)), lanes_of[method].values())
    n, cost = exits[1], (exits[1] + 1 / 6) / depth
    asked = f"With branches exit {n} costs {n} layers and a sixth of one, for the branch that was asked in vain"
    axes[-1].set(xlabel=f"layer\n{asked}: ({n} + 1/6) / {depth} = {cost:.2f}", xticks=range(1 + depth))
    for name, colour in (("the layer ran for all tokens", ALL_TOKENS), ("for [CLS] alone", CLS_ALONE)):
        axes[0].barh(0, 0, color=colour, label=name)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plt.show()
