"""The settings that a user need not give: where the exits are, and the paper's learning rates (Table 2)."""

# Depth of the encoder to exit layers, counted from 1 (Sec. 3.2; the 6 of MiniLM are ours).
EXIT_LAYERS = {6: (1, 2, 3, 6), 12: (1, 4, 6, 12), 24: (1, 6, 12, 24)}

# Table 2, in 1e-5: what gave the largest area under the speed-accuracy curve, for EE, MM and SWEET.
TABLE_2 = {
    "bert-base": {
        "sst2": (5, 5, 5),
        "mrpc": (5, 3, 4),
        "cola": (4, 4, 5),
        "mnli": (5, 5, 5),
        "qqp": (5, 5, 5),
        "qnli": (5, 4, 5),
        "rte": (5, 5, 4),
    },
    "bert-large": {
        "sst2": (4, 2, 2),
        "mrpc": (4, 5, 4),
        "cola": (4, 3, 4),
        "mnli": (4, 3, 4),
        "qqp": (5, 3, 4),
        "qnli": (4, 4, 3),
        "rte": (3, 3, 3),
    },
    "deberta-base": {
        "sst2": (3, 3, 3),
        "mrpc": (4, 5, 5),
        "cola": (4, 5, 4),
        "mnli": (2, 4, 3),
        "qqp": (4, 5, 5),
        "qnli": (3, 4, 3),
        "rte": (2, 1, 4),
    },
    "deberta-large": {
        "sst2": (2, 4, 3),
        "mrpc": (3, 2, 1),
        "cola": (3, 3, 2),
        "mnli": (2, 2, 2),
        "qqp": (2, 2, 3),
        "qnli": (3, 2, 1),
        "rte": (1, 2, 2),
    },
}


def default_learning_rate(model: str, task: str, method: str) -> float:
    """The paper's rate for this model, task and method; 2e-4 for minilm-l6, 5e-5 where the paper has none."""
    if model == "minilm-l6":
        return 2e-4
    rates = TABLE_2.get(model, {}).get(task, (5, 5, 5))
    return rates[("ee", "mm", "sweet").index(method)] / 1e5


def search_rates(model: str) -> list[float]:
    """The learning rates to choose from: the paper's five (App. A), and larger ones for minilm-l6."""
    return [5e-5, 1e-4, 2e-4, 4e-4] if model == "minilm-l6" else [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]


def default_batch_size(model: str) -> int:
    """16, and 8 for deberta-large, as in App. A."""
    return 8 if model == "deberta-large" else 16
