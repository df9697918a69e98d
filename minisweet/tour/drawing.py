"""The pictures of the tour, minisweet/tour/tour.ipynb. Letters: K exits, N sentences."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from minisweet.adaptive import Exits

EXITS = {1: "#FDE725", 2: "#5EC962", 3: "#21918C", 6: "#3B528B"}  # of the exits: the later, the darker
ALL_TOKENS, CLS_ALONE = "#3B528B", "#FDE725"


def who_leaves(shares: dict[str, dict[str, Sequence[float]]], exits: Sequence[int]) -> None:
    """For each title a panel, with a bar for each level: the percent (K,) of its sentences that leave at each exit."""
    figure, axes = plt.subplots(1, len(shares), figsize=(10, 2.4), sharey=True)
    for axis, (title, levels) in zip(axes, shares.items(), strict=True):
        start = np.zeros(len(levels))
        for layer, share in zip(exits, np.array(list(levels.values())).T, strict=True):
            axis.barh(list(levels), share, left=start, color=EXITS[layer], label=f"after layer {layer}")
            start += share
        axis.set(title=title, xlabel="percent of the level's sentences")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(exits), frameon=False)
    plt.show()


def part_of(name: str, exits: Sequence[int]) -> str:
    """The part of a model that a parameter belongs to, by its name: "layer 3", "head 1", "embeddings" and so on."""
    words = name.split(".")
    if words[0] == "encoder":
        return f"layer {int(words[2]) + 1}" if words[1] == "layers" else "embeddings"
    return f"{'head' if words[0] == 'heads' else 'branch'} {exits[int(words[1])]}"


def reach(norms: dict[str, dict[str, np.ndarray]], exits: Sequence[int]) -> None:
    """Where each exit's loss arrives. For each method and part of the model: the norms of K gradients."""
    parts = ["embeddings", *(f"layer {n}" for n in range(1, 1 + exits[-1])), *(f"head {n}" for n in exits)]
    parts += [f"branch {n}" for n in exits[:-1]]
    figure, axes = plt.subplots(1, len(norms), figsize=(10, 4.4), sharey=True)
    for axis, (method, of_part) in zip(axes, norms.items(), strict=True):
        grid = np.array([of_part.get(part, np.full(len(exits), np.nan)) for part in parts])
        colours = np.log10(np.where(grid > 0, grid, np.nan))
        image = axis.imshow(colours, vmin=-4, vmax=0, cmap="viridis_r", aspect="auto")
        for row, k in np.argwhere(grid == 0):
            axis.text(k, row, "·", ha="center", va="center", fontsize=14)
        axis.set(title=method, xticks=range(len(exits)), xticklabels=exits, xlabel="loss of the exit after layer")
    axes[0].set_yticks(range(len(parts)), parts)
    figure.colorbar(image, ax=axes, label="norm of the gradient, power of ten")
    plt.show()


def owners(norms: dict[str, dict[str, np.ndarray]], exits: Sequence[int]) -> None:
    """The same as the model stands: each part in the colours of the exits whose losses train it."""
    figure, axes = plt.subplots(1, len(norms), figsize=(10, 4), sharey=True)
    for axis, (method, of_part) in zip(axes, norms.items(), strict=True):
        for part, values in of_part.items():
            name, _, n = part.partition(" ")
            y, x = (int(n) if n else 0), {"branch": 1.15, "head": 2.3}.get(name, 0)
            trained = [layer for layer, value in zip(exits, values, strict=True) if value > 0]
            for i, layer in enumerate(trained):
                axis.barh(y, 1 / len(trained), 0.7, x + i / len(trained), color=EXITS[layer])
            axis.barh(y, 1, 0.7, x, color="none" if trained else "0.85", edgecolor="0.3")
            axis.text(x + 0.5, y, name if n else part, ha="center", va="center", fontsize=9)
        ticks = {"xticks": [], "yticks": range(1 + exits[-1]), "yticklabels": ["words", *range(1, 1 + exits[-1])]}
        axis.set(title=method, xlim=(-0.1, 3.4), **ticks)
    axes[0].set_ylabel("layer")
    for layer in exits:
        axes[0].plot([], [], "s", color=EXITS[layer], label=f"loss of exit {layer}")
    figure.legend(loc="outside lower center", ncols=len(exits), frameon=False)
    plt.show()


def reliability(confidences: dict[str, dict[str, np.ndarray]], right: dict[str, np.ndarray]) -> None:
    """How often an exit is right, by how sure it is. For each title and name: confidences (N,), and who is right."""
    _, axes = plt.subplots(1, len(confidences), figsize=(8, 3), sharey=True)
    edges = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.001])
    for axis, (title, of_name) in zip(axes, confidences.items(), strict=True):
        axis.plot([50, 100], [50, 100], color="0.7", label="as sure as right")
        for (name, sure), style in zip(of_name.items(), ("o--", "s-"), strict=True):
            bins = [(low <= sure) & (sure < high) for low, high in zip(edges, edges[1:], strict=False)]
            points = [(100 * sure[some].mean(), 100 * right[title][some].mean()) for some in bins if some.sum() > 20]
            axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set(title=title, xlabel="mean confidence, percent")
    axes[0].set_ylabel("percent right")
    axes[0].legend()
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
        for name, tokens in sorted(ran, key=lambda step: -step[1]):  # [CLS] alone is drawn over all tokens
            y = next(y for y, lane in enumerate(lanes) if name.startswith(lane))
            place = int(name.rpartition(".")[2])
            n = exits[place] if lanes[y] == "branches" else place + 1
            width, colour = (0.2, CLS_ALONE) if tokens == 1 else (0.8, ALL_TOKENS)
            axis.barh(y, width, 0.6, n - 0.4, color=colour)
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
