"""Make tests/golden.safetensors: hidden states and logits of `transformers`, so that the tests need not install it.

    python -m tests.make_golden

The weights are not stored: `formula_weights` makes the same on every machine. The file's metadata says which versions
made it.
"""

import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden.safetensors"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.02,
}
CONFIGS = {
    "bert": {"model_type": "bert", **SIZES, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "deberta": {
        "model_type": "deberta",
        **SIZES,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": "c2p|p2c",
        "max_relative_positions": 5,
        "layer_norm_eps": 1e-7,
        "pooler_hidden_size": 16,
    },
}
INPUTS = {
    "input_ids": torch.tensor([[2, 11, 12, 3, 13, 14, 15, 3], [2, 39, 20, 3, 21, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]),
    "token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]]),
}


def formula_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """A tensor for each name and shape: a sine whose pitch and phase come from the name. LayerNorm's is around 1."""
    weights = {}
    for name, shape in shapes.items():
        number = zlib.crc32(name.encode())
        steps = torch.arange(math.prod(shape), dtype=torch.float64)
        wave = 0.4 * torch.sin(steps * (1.0 + number % 1000 / 1000) + number % 7)
        weights[name] = (wave + (1.0 if name.endswith("LayerNorm.weight") else 0.0)).float().view(shape)
    return weights


def main() -> None:
    """Run both reference models for sequence classification and write what they answer."""
    import transformers
    from safetensors.torch import save_file

    classes = {
        "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
        "deberta": (transformers.DebertaConfig, transformers.DebertaForSequenceClassification),
    }
    golden = {}
    for model_type, (config_class, model_class) in classes.items():
        settings = {key: value for key, value in CONFIGS[model_type].items() if key != "model_type"}
        model = model_class(config_class(**settings)).eval()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        model.load_state_dict(formula_weights(shapes), strict=True)
        with torch.no_grad():
            output = model(**INPUTS, output_hidden_states=True)
        golden[f"{model_type}.hidden"] = torch.stack(output.hidden_states)
        golden[f"{model_type}.logits"] = output.logits
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__, "script": "tests/make_golden.py"}
    save_file(golden, GOLDEN, metadata=made_by)
    print(f"{GOLDEN}: {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in golden.items())}; {made_by}")


if __name__ == "__main__":
    main()
