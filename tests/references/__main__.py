"""Make the references again: tiny checkpoints, and the hidden states that transformers computes with them.

    pip install transformers==5.24.0
    python -m tests.references

Each encoder has a folder here. transformers writes config.json and model.safetensors. states.safetensors holds the
inputs (B, T) and the hidden states (L+1, N, D) of the N tokens that are not padding, computed in float32 and evaluation
mode; its metadata names the version of transformers. tests/test_references.py compares our hidden states with these.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from tests.conftest import CONFIGS

# Two heads of size 8, because equal numbers hide a mix-up, and an epsilon large enough to show.
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 105,
    "layer_norm_eps": 1e-3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
}
LENGTHS = torch.tensor([[100], [37], [5]])  # MPNet's last bucket begins at a distance of 91


def write_reference(model_type: str) -> None:
    """Write the folder of one encoder."""
    torch.manual_seed(0)
    folder, T = Path(__file__).parent / model_type, LENGTHS.max()
    config = transformers.AutoConfig.for_model(**CONFIGS[model_type] | SIZES)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # biases and LayerNorms too: a term of size 0 or 1 could hide
        torch.nn.init.normal_(parameter, std=0.3)
    mask = (torch.arange(T) < LENGTHS).long()
    types = torch.randint(0, 2, mask.shape) * (LENGTHS < T)  # the first row has the default mask and types
    inputs = {"input_ids": torch.randint(2, 50, mask.shape), "attention_mask": mask, "token_type_ids": types}
    read = {name: value for name, value in inputs.items() if (model_type, name) != ("mpnet", "token_type_ids")}
    with torch.no_grad():
        states = torch.stack(model(**read, output_hidden_states=True).hidden_states)  # (L+1, B, T, D)
    model.save_pretrained(folder)
    stored = inputs | {"hidden_states": states[:, mask == 1]}
    save_file(stored, folder / "states.safetensors", metadata={"transformers": transformers.__version__})


for model_type in CONFIGS:
    write_reference(model_type)
