"""Make tests/golden.safetensors: hidden states and logits of transformers, so that the tests need not install it.

    python -m tests.make_golden

The weights are not stored: `formula_weights` makes the same on every machine.
"""

import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import CONFIGS, random_batch

GOLDEN = Path(__file__).with_name("golden.safetensors")


def formula_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """A tensor for each name and shape: a sine whose pitch and phase come from the name. LayerNorm's is around 1."""
    weights = {}
    for name, shape in shapes.items():
        number = zlib.crc32(name.encode())
        steps = torch.arange(math.prod(shape), dtype=torch.float64)
        wave = 0.4 * torch.sin(steps * (1.0 + number % 1000 / 1000) + number % 7)
        weights[name] = (wave + (1.0 if name.endswith("LayerNorm.weight") else 0.0)).float().view(shape)
    return weights


def without_1(input_ids: Tensor) -> Tensor:
    """The same ids, but 2 for 1, which is padding to MPNet."""
    return input_ids.where(input_ids != 1, 2)


def main() -> None:
    """Run both reference models for sequence classification and write what they answer."""
    import transformers

    golden = {}
    inputs = dict(zip(("input_ids", "attention_mask", "token_type_ids"), random_batch(), strict=True))
    for model_type, config in CONFIGS.items():
        config = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        own = inputs
        if model_type == "mpnet":  # which reads no token types, and gives no position to id 1, its padding
            own = {"input_ids": without_1(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
        parameters = {name.removeprefix(f"{model_type}."): value for name, value in model.named_parameters()}
        weights = formula_weights({name: value.shape for name, value in parameters.items()})
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(weights[name])
            output = model(**own, output_hidden_states=True)
        golden |= {f"{model_type}.hidden": torch.stack(output.hidden_states), f"{model_type}.logits": output.logits}
    save_file(golden | inputs, GOLDEN, metadata={"transformers": transformers.__version__, "torch": torch.__version__})


if __name__ == "__main__":
    main()
