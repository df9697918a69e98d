"""What several tests use: tiny models in the Hugging Face layout, with random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minisweet import bert, deberta
from minisweet.bert import BertConfig, BertEncoder
from minisweet.deberta import DebertaConfig, DebertaEncoder

CHECKOUT = Path(__file__).parent.parent
SHARED = CHECKOUT.parent / "shared"


def pytest_configure(config) -> None:
    """One thread: tiny models lose more to waiting threads than they gain, above all on a busy machine."""
    config.addinivalue_line("markers", "slow: takes seconds, and runs by `-m slow` or in .ci/run")
    torch.set_num_threads(1)


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
    is_bert = isinstance(encoder, BertEncoder)
    tensors = {}
    names = (bert if is_bert else deberta).checkpoint_names(encoder.config.num_hidden_layers)
    for name, tensor in encoder.state_dict().items():
        sources = names[name]
        tensors |= dict(zip(sources, tensor.clone().chunk(len(sources)), strict=True))
    if is_bert and pooler:
        D = encoder.config.hidden_size
        tensors |= {"pooler.dense.weight": torch.randn(D, D) * 0.2, "pooler.dense.bias": torch.randn(D) * 0.2}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_model(folder: Path, model_type: str, **changes) -> Path:
    """Write a tiny model, tokenizer and all, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[model_type] | changes))
    save_file(checkpoint_tensors(tiny_encoder(model_type, **changes)), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "."]) + "\n")
    return folder


def random_batch(seed: int = 0, batch: int = 4, length: int = 11, vocab: int = 60) -> tuple[torch.Tensor, ...]:
    """input_ids, attention_mask with padding at the end, and token_type_ids."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return input_ids, mask, (torch.arange(length) >= length // 2).long().expand(batch, -1) * mask


@pytest.fixture(params=["bert", "deberta"])
def model_type(request) -> str:
    """Both encoders."""
    return request.param


@pytest.fixture
def model_dir(tmp_path, model_type) -> Path:
    """A tiny model's folder."""
    return write_model(tmp_path / "tiny", model_type)
