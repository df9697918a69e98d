"""What several tests use: tiny models in the Hugging Face layout, with random weights."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minisweet import MultiExitModel, build_multi_model, load_encoder
from minisweet.base.commands import run_command
from minisweet.bert import BertConfig, BertEncoder
from minisweet.branches import BranchModel
from minisweet.checkpoint import checkpoint_names
from minisweet.data import toy
from minisweet.deberta import DebertaConfig, DebertaEncoder
from minisweet.evaluation import timing
from minisweet.exits import MultiModel
from minisweet.layers import float32_by_onednn

CHECKOUT = Path(__file__).parent.parent


def exit_model(encoder, exit_layers, num_labels, method="sweet", strategy="confidence"):
    """A model of one encoder, by the name of its method."""
    if method == "branch":
        return BranchModel(encoder, exit_layers, num_labels, strategy)
    return MultiExitModel(encoder, exit_layers, num_labels, method, strategy)


def pytest_configure(config) -> None:
    """One thread: tiny models lose more to waiting threads than they gain, above all on a busy machine. Nor is the disk
    waited for: no test cuts the power.
    """
    torch.set_num_threads(1)
    os.fsync = lambda held: None


@pytest.fixture(autouse=True)
def products_as_torch_chooses():
    """Undo what a command's `tune_cpu` set for its process."""
    yield
    if float32_by_onednn():
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


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
}
WORDS = "the a film was not good bad great dull but and i you we it is in of to superb awful".split()


def tiny_encoder(model_type: str, seed: int = 0, scale: float = 0.2, **changes) -> BertEncoder | DebertaEncoder:
    """An encoder with weights large enough that every term of it shows in its output."""
    settings = {key: value for key, value in CONFIGS[model_type].items() if key != "model_type"} | changes
    torch.manual_seed(seed)
    is_bert = model_type == "bert"
    encoder = BertEncoder(BertConfig(**settings)) if is_bert else DebertaEncoder(DebertaConfig(**settings))
    for name, parameter in encoder.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=scale)
    return encoder


def checkpoint_tensors(encoder: BertEncoder | DebertaEncoder, pooler: bool = True) -> dict[str, torch.Tensor]:
    """The encoder's weights under the names of the public checkpoints."""
    tensors, names = {}, checkpoint_names(encoder.config.num_hidden_layers)
    for name, tensor in encoder.state_dict().items():
        tensors |= dict(zip(names[name], tensor.clone().chunk(len(names[name])), strict=True))
    if isinstance(encoder, BertEncoder) and pooler:
        D = encoder.config.hidden_size
        tensors |= {"pooler.dense.weight": torch.randn(D, D) * 0.2, "pooler.dense.bias": torch.randn(D) * 0.2}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_model(folder: Path, model_type: str, **changes) -> Path:
    """Write a tiny model, tokenizer and all, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[model_type] | changes))
    save_file(checkpoint_tensors(tiny_encoder(model_type, **changes)), folder / "model.safetensors")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "."]
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


def undecided_model(
    folder: Path, method: str, num_labels: int = 2, seed: int = 0, strategy: str = "confidence"
) -> MultiExitModel | MultiModel:
    """A model with exits after layers 1, 2 and 4, in evaluation mode, whose exits are sure of some instances."""
    torch.manual_seed(seed)
    if method == "mm":
        model = build_multi_model(folder, (1, 2, 4), num_labels, strategy)
    else:
        model = exit_model(load_encoder(folder), (1, 2, 4), num_labels, method, strategy)
    for name, parameter in model.named_parameters():
        if "classifier" in name or "lte" in name:
            torch.nn.init.normal_(parameter)
        elif "branches" in name:  # no copies any more
            parameter.data.mul_(1.2)
    return model.eval()


def all_exits(model: MultiExitModel | MultiModel, batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What all exits say of a batch: logits (K, B, C) and certainties (K or K-1, B), or None."""
    logits, certainty = zip(*model.exit_by_exit(*batch), strict=True)
    known = [values for values in certainty if values is not None]
    return torch.stack(logits), torch.stack(known) if known else None


@pytest.fixture(params=["bert", "deberta"])
def model_type(request) -> str:
    """Both encoders."""
    return request.param


# For tests that take long: DeBERTa's part runs with `-m slow`.
DEBERTA_IS_SLOW = pytest.mark.parametrize("model_type", ["bert", pytest.param("deberta", marks=pytest.mark.slow)])


@pytest.fixture
def model_dir(tmp_path, model_type) -> Path:
    """A tiny model's folder."""
    return write_model(tmp_path / "tiny", model_type)


def draw_quickly(monkeypatch) -> None:
    """A figure is made, but its file is no whole PNG."""
    with suppress(ImportError):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **options: path.write_bytes(b"\x89PNG"))


def be_quick(monkeypatch) -> None:
    """Give commands less to do: the toy task has 400 rows to train on and 200 to validate on, live early exit times 10
    of them alone, and figures are drawn quickly.
    """
    draw_quickly(monkeypatch)
    monkeypatch.setitem(toy.SIZES, "train", 400)
    monkeypatch.setitem(toy.SIZES, "dev", 200)
    monkeypatch.setattr(timing, "LATENCY_INSTANCES", 10)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder, quickly: its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    be_quick(monkeypatch)

    def run(module, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            run_command(module.main)
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def quick(model, *arguments) -> list:
    """train.py's arguments for a run in no time."""
    sizes = ["--train-size", 48, "--epochs", 2, "--exit-layers", "1,2,4", "--max-length", 32]
    return ["--model", model, *sizes, *arguments]
