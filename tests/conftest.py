"""What several tests use: tiny models with random weights, a way to run commands, and one finished run per method."""

import functools
import importlib
import json
import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from minisweet import NgramExit, toy
from minisweet.base.commands import run_command
from minisweet.base.files import InputError
from minisweet.checkpoint import load_encoder, public_name
from minisweet.confidence import CRITERIA, confidence, exits_taken
from minisweet.exits import Answer, MultiExitModel, build_models, exit_loss
from minisweet.inference import early_exit
from minisweet.layers import TransformerEncoder
from minisweet.loading import ARCHITECTURES
from minisweet.tasks import TASKS, load_examples
from minisweet.texts import Texts, load_tokenizer

CHECKOUT = Path(__file__).parent.parent
LARGEST: dict[str, float] = {}  # differences to references, by what was compared
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
CONFIGS = {
    "bert": {"model_type": "bert", **SIZES, "type_vocab_size": 2},
    "deberta": {
        "model_type": "deberta",
        **SIZES,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": "c2p|p2c",
        "max_relative_positions": 6,
    },
    "mpnet": {"model_type": "mpnet", **SIZES, "max_position_embeddings": 42},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = "the a film was not good bad great dull but and i you we it is in of to superb awful".split()
OWN = "--model tiny --max-length 32 --amp off --epochs 2 --lr 3e-3".split()  # `minisweet fit` in own_run's folder


def pytest_configure(config) -> None:
    """One thread, since tiny models lose more to waiting threads than they gain. A learner's own file runs first.

    `MINE=my_exits.py python -m pytest tests/test_paper.py` runs my_exits.py, which puts a function or a class of its
    own in place of the package's, such as `minisweet.exits.stop_gradient = mine`.
    """
    torch.set_num_threads(1)
    if config.option.markexpr != "gpu":  # scores and precisions are those of CPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    settings.register_profile("slow machines", deadline=None, max_examples=20)
    settings.load_profile("slow machines")
    if mine := os.environ.get("MINE"):
        runpy.run_path(mine)


@pytest.fixture(params=CONFIGS)
def model_type(request) -> str:
    """Each encoder."""
    return request.param


@pytest.fixture
def model_dir(tmp_path, model_type) -> Path:
    """A tiny model's folder."""
    return write_model(tmp_path / "tiny", model_type)


def tiny_encoder(model_type: str, seed: int = 0, scale: float = 0.2, **changes) -> TransformerEncoder:
    """An encoder with weights large enough that every term of it shows in its output."""
    settings = {key: value for key, value in CONFIGS[model_type].items() if key != "model_type"} | changes
    torch.manual_seed(seed)
    config, kind = ARCHITECTURES[model_type]
    encoder = kind(config(**settings))
    for name, parameter in encoder.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=scale)
    return encoder


def write_model(folder: Path, model_type: str, **changes) -> Path:
    """Write a tiny model, tokenizer and all, to `folder`. The keys' biases and the pooler are among its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[model_type] | changes))
    encoder = tiny_encoder(model_type, **changes)
    D, weights = encoder.config.hidden_size, encoder.state_dict()
    weights |= {name.replace("query", "key"): torch.randn(D) for name in weights if name.endswith("query.bias")}
    tensors = {public_name(name, model_type): tensor for name, tensor in weights.items()}
    if model_type != "deberta":
        tensors |= {"pooler.dense.weight": torch.randn(D, D) * 0.2, "pooler.dense.bias": torch.randn(D) * 0.2}
    save_file(tensors, folder / "model.safetensors")
    first = ["<s>", "<pad>", "</s>"] if model_type == "mpnet" else []  # at the public model's places
    vocabulary = [*first, "[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "."]
    size = changes.get("vocab_size", SIZES["vocab_size"])
    vocabulary += [f"[unused{i}]" for i in range(len(vocabulary), size)]  # as many tokens as the embedding has rows
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


def random_batch(seed: int = 0, batch: int = 4, length: int = 11, vocab: int = 60) -> tuple[torch.Tensor, ...]:
    """input_ids, attention_mask with padding at the end, and token_type_ids."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return input_ids, mask, (torch.arange(length) >= length // 2).long().expand(batch, -1) * mask


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the checkpoint's dictionary of tensors."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def reconfigure(folder: Path, base: str, **changes) -> None:
    """Write config.json anew, with some keys changed; "absent" leaves a key out."""
    content = {key: value for key, value in (CONFIGS[base] | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(content))


def toy_examples(folder: Path, rows: range | list[int], max_length: int = 32) -> Texts:
    """Rows of the toy task, in the tokens of a tiny model."""
    tokenizer = load_tokenizer(folder, SIZES["vocab_size"], max_length)
    return Texts(tokenizer, load_examples("toy", "train", Path()).take(rows))


def note_difference(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Keep the largest difference to a reference, for the end of pytest's output."""
    LARGEST[what] = max(LARGEST.get(what, 0.0), (ours - theirs).abs().max().item())


def pytest_terminal_summary(terminalreporter) -> None:
    """Tell how far we are from the references that were compared."""
    for what, difference in sorted(LARGEST.items()):
        terminalreporter.write_line(f"largest difference, {what}: {difference:.1e}")


def without_1(input_ids: torch.Tensor) -> torch.Tensor:
    """The same ids, but 2 for 1, which is padding to MPNet."""
    return input_ids.where(input_ids != 1, 2)


def models_of(
    folder: Path, method: str, layers=(1, 2, 4), num_labels=2, strategy="confidence", seed=0, pooling=None
) -> list[MultiExitModel]:
    """A method's models of a folder's checkpoint, with exits after these layers."""
    torch.manual_seed(seed)
    first_layers = functools.partial(load_encoder, folder, pooling=pooling)
    return build_models(method, first_layers, layers, num_labels, strategy)


def model_of(*args, **options) -> MultiExitModel:
    """The one model of EE or SWEET; see `models_of`."""
    (model,) = models_of(*args, **options)
    return model


def answers_of(models: list[MultiExitModel], batch: tuple) -> list[Answer]:
    """The answers of all exits."""
    return [answer for model in models for answer in model(*batch)]


def exit_losses(model: MultiExitModel, batch: tuple, labels: torch.Tensor) -> list[torch.Tensor]:
    """Each exit's loss, of one forward pass."""
    return [exit_loss(answer, labels) for answer in model(*batch)]


def owners(model: MultiExitModel, batch: tuple, labels: torch.Tensor) -> dict[str, set[int]]:
    """The ownership matrix: which exits' losses, from 0, give each parameter a gradient other than zero."""
    matrix = {name: set() for name, _ in model.named_parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for k, loss in enumerate(exit_losses(model, batch, labels)):
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None and gradient.abs().max() > 0:
                    matrix[name].add(k)
    return matrix


def right_owners(name: str, exit_layers: tuple[int, ...], method: str) -> set[int]:
    """Which exits' losses are to update a parameter."""
    kind, k, *rest = name.split(".")
    if kind == "heads":
        return {int(k)}
    layer = int(rest[0]) + 1 if k == "layers" else 1  # the embeddings and the table of positions belong to layer 1
    later = {k for k, exit_layer in enumerate(exit_layers) if layer <= exit_layer}
    return later if method == "ee" else set(sorted(later)[:1])  # with SWEET, the next exit alone


def undecided_models(*args, **options) -> list[MultiExitModel]:
    """As `models_of`, in evaluation mode, and sure of some texts."""
    models = models_of(*args, **options)
    for name, parameter in torch.nn.ModuleList(models).named_parameters():
        if "classifier" in name or "lte" in name:
            torch.nn.init.normal_(parameter)
    return [model.eval() for model in models]


def live_as_swept(models: list[MultiExitModel], batch: tuple, labels: torch.Tensor, criterion: str) -> torch.Tensor:
    """Compare live early exit with the sweep, at many thresholds. Returns the confidences (K, N)."""
    with torch.no_grad():
        answers = answers_of(models, batch)
    fitted, everybody = [CRITERIA[criterion].fit(answer, labels) for answer in answers], torch.arange(len(labels))
    sure = torch.stack([confidence(criterion, *of_exit) for of_exit in zip(answers, fitted, strict=True)])  # (K, N)
    predictions = torch.stack([answer.logits.argmax(-1) for answer in answers])  # (K, N)
    for threshold in torch.linspace(CRITERIA[criterion].lowest(models[0].num_labels), 1, 21).tolist():
        live, swept = early_exit(models, *batch, threshold, fitted, criterion), exits_taken(sure, threshold)
        assert live.exits.tolist() == swept.tolist()
        assert live.labels.tolist() == predictions[swept, everybody].tolist()
        torch.testing.assert_close(live.confidence, sure[swept, everybody], atol=1e-4, rtol=1e-4)
    return sure


@contextmanager
def in_folder(folder: Path):
    """Within, commands run in `folder` and quickly: few rows in the toy task, no figure drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(toy.SIZES, "train", 400)
        patch.setitem(toy.SIZES, "dev", 200)
        patch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **options: path.write_bytes(b"\x89PNG"))
        yield


def run(command, *arguments) -> int:
    """Call a module's main(), or a command of own text, with these arguments; returns its exit status."""
    room, _, name = command.__name__.rpartition(".")
    words = list(map(str, arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        try:
            if callable(command):
                run_command(lambda: command(words), f"minisweet {name}")
            elif room.startswith("minisweet."):
                run_command(lambda: command.main(words), f"minisweet {name}")
            else:
                run_command(command.main)
        except SystemExit as stopped:
            return stopped.code
    return 0


def refused(call, *arguments, **more) -> str:
    """The message of the InputError that a call raises."""
    with pytest.raises(InputError) as error:
        call(*arguments, **more)
    return str(error.value)


def command_of(path: str):
    """What `run` takes, from a value of COMMANDS: a module, or a function in it."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name) if name else importlib.import_module(module)


@pytest.fixture
def command(capsys, tmp_path):
    """Run a command in an empty folder, quickly: its exit status, standard output and standard error."""

    def run_and_read(module, *arguments) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        status = run(module, *arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    with in_folder(tmp_path):
        yield run_and_read


def quick(model, *arguments) -> list:
    """train.py's arguments for a run in no time, and of the same losses on every machine."""
    words = "--train-size 48 --epochs 2 --exit-layers 1,2,4 --max-length 32 --amp off".split()  # later options win
    return ["--model", model, *words, *arguments]


def write_table(path: Path, columns: list[str], labels: dict, header: bool = True, between: str = ",") -> None:
    """Write 300 rows of random words; `labels` are the values to draw from, by the column."""
    draw, rows = Random(path.name), [columns] * header
    for _ in range(300):
        texts = (" ".join(draw.choices(WORDS, k=6)) for _ in columns)
        rows.append([draw.choice(labels.get(*pair)) for pair in zip(columns, ([text] for text in texts), strict=True)])
    path.write_text("".join(between.join(row) + "\n" for row in rows))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run a guide in, with tiny models under the presets' names, and tiny tasks of GLUE."""
    monkeypatch.setenv("MINISWEET_HOME", str(tmp_path / "home"))
    for name, kind, layers in (("minilm-l6", "bert", 6), ("bert-base", "bert", 12), ("mpnet-base", "mpnet", 12)):
        sizes = {"num_hidden_layers": layers, "max_position_embeddings": 258}
        write_model(tmp_path / "home" / "weights" / name, kind, **sizes)
    for task in (task for task in TASKS.values() if task.folder):
        labels = {task.columns[-1]: list(map(str, range(len(task.labels)))) if task.numbered else task.labels}
        (tmp_path / "home" / "data" / task.folder).mkdir(parents=True)
        for file in task.files:
            path = tmp_path / "home" / "data" / task.folder / file
            write_table(path, list(task.header or task.columns), labels, task.header is None, "\t")
    with in_folder(tmp_path):
        yield tmp_path


def write_model_of_words(folder: Path) -> Path:
    """A tiny BERT whose embeddings tell the toy task's good words from its bad ones, so that little training is enough.

    Its exits are then sure and right where a text has one such word, and unsure elsewhere.
    """
    write_model(folder, "bert", **NO_DROPOUT)
    vocabulary, tensors = (folder / "vocab.txt").read_text().split(), load_file(folder / "model.safetensors")
    unused = [n for n, word in enumerate(vocabulary) if word.startswith("[unused")]
    for words, side in ((toy.POSITIVE, 2.0), (toy.NEGATIVE, -2.0)):
        for word in words:
            n = vocabulary.index(word) if word in vocabulary else unused.pop()
            vocabulary[n] = word
            tensors["embeddings.word_embeddings.weight"][n, 0] += side
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """A function that gives the folder of a finished run, which is evaluated: of a method, "lte" or "bag".

    Each is made at its first use, of a tiny BERT in the folder `tiny` beside it. Nobody changes one: copy it first.
    """
    import evaluate
    import train
    from minisweet.classifier.main import fit

    folder = tmp_path_factory.mktemp("runs")
    model = write_model_of_words(folder / "tiny")

    @functools.cache
    def finished(name: str) -> Path:
        options = ["--model", model, "--out", name, "--max-length", 32, "--amp", "off", "--epochs", 4, "--lr", "3e-3"]
        with in_folder(folder):
            if name == "bag":
                assert run(toy, "words.csv") == run(fit, "words.csv", *options) == 0
            else:
                method = ["--method", *(["sweet", "--exit-strategy", "lte"] if name == "lte" else [name])]
                assert run(train, *options, "--exit-layers", "1,2,4", "--train-size", 200, *method) == 0
                assert run(evaluate, name) == 0
        return folder / name

    return finished


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
    """What `minisweet fit` makes of own.csv and more.csv, which lie beside it, with the model `tiny`."""
    from minisweet.classifier.main import fit

    folder = tmp_path_factory.mktemp("own")
    write_model_of_words(folder / "tiny")
    rows, unlabelled = opinions(1000)[:300], opinions(1000)[300:800]
    write_rows(folder / "own.csv", rows, "text", "label")
    more = [(text, "unread") for text, _ in unlabelled + rows[:20] + unlabelled[:7]]
    write_rows(folder / "more.csv", more, "text", "label")
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
    write_model(folder, "bert")
    head = {"classifier.weight": torch.randn(2, 16), "classifier.bias": torch.randn(2)}
    rewrite(folder, lambda tensors: tensors | head)
    reconfigure(folder, "bert", **changes)
    return folder
