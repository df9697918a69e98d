"""What only the tests of own text use. conftest.py imports it, so that pytest finds the fixture."""

from pathlib import Path
from random import Random

import pytest
import torch

from minisweet import NgramExit

OWN = "--model tiny --max-length 32 --amp off --epochs 2 --lr 3e-3".split()  # `minisweet fit` in own_run's folder


def opinions(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Different texts, each with a word that decides whether its label is up or down."""
    draw, found = Random(seed), {}
    while len(found) < count:
        label = draw.choice(["up", "down"])
        words = [draw.choice("good great superb".split() if label == "up" else "bad dull awful".split())]
        words += draw.choices("the a film was but and i you it is".split(), k=6)
        found[" ".join(draw.sample(words, 7))] = label
    return list(found.items())


def write_rows(path: Path, rows: list[tuple], *columns: str) -> Path:
    """Write a CSV of cells that need no quotes."""
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [columns, *rows]))
    return path


@pytest.fixture(scope="session")
def own_run(tmp_path_factory) -> Path:
    """What `minisweet fit` makes of own.csv and more.csv, which lie beside it, with the model `tiny`, and new.csv."""
    from minisweet.classifier.main import fit
    from tests.conftest import in_folder, run, write_model_of_words

    folder = tmp_path_factory.mktemp("own")
    write_model_of_words(folder / "tiny")
    rows, unlabelled = opinions(1000)[:300], opinions(1000)[300:800]
    write_rows(folder / "own.csv", rows, "text", "label")
    more = [(text, "unread") for text, _ in unlabelled + rows[:20] + unlabelled[:7]]
    write_rows(folder / "more.csv", more, "text", "label")
    write_rows(folder / "new.csv", opinions(1000)[800:], "text", "label")
    with in_folder(folder):
        assert run(fit, "own.csv", "--unlabelled", "more.csv", "--out", "run", *OWN) == 0
    return folder / "run"


def random_bag(num_labels: int) -> NgramExit:
    """A bag of words whose table holds random numbers."""
    bag, generator = NgramExit(60, num_labels, [0, 1, 2, 3]), torch.Generator().manual_seed(1)
    for tensor in bag.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return bag


def write_classifier(folder: Path, **changes) -> Path:
    """A tiny BERT that was fine-tuned elsewhere for two classes."""
    from tests.conftest import reconfigure, rewrite, write_model

    write_model(folder, "bert")
    head = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    rewrite(folder, lambda tensors: tensors | head)
    reconfigure(folder, "bert", **changes)
    return folder
