"""Compare public weights with transformers, or make the recorded references again. Needs transformers==5.24.0.

    python -m tests.references --weights bert-base     # a preset, a folder or a hub id
    python -m tests.references                         # make the tiny references again

The comparison is of all hidden states, and of the gradients of one loss by each parameter; it prints the largest
differences, and fails with status 1 if one is above 1e-4 (of gradients: as a share of the largest).

Each tiny reference has a folder here. transformers writes config.json and model.safetensors. states.safetensors holds
the inputs (B, T) and the hidden states (L+1, N, D) of the N tokens that are not padding, computed in float32 and
evaluation mode; its metadata names the version of transformers. tests/test_references.py compares ours with these.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from safetensors.torch import save_file

from minisweet import load_encoder
from minisweet.checkpoint import public_name
from minisweet.hub import model_folder
from minisweet.loading import read_config
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


def inputs_of(model_type: str, vocab_size: int) -> tuple[dict, dict]:
    """Ids, mask and types (B, T) of texts of LENGTHS, the first of one sentence; and those that transformers reads."""
    torch.manual_seed(0)
    mask = (torch.arange(int(LENGTHS.max())) < LENGTHS).long()
    types = torch.randint(0, 2, mask.shape) * (LENGTHS < LENGTHS.max())
    inputs = {"input_ids": torch.randint(5, vocab_size, mask.shape), "attention_mask": mask, "token_type_ids": types}
    without = {"mpnet": "token_type_ids"}.get(model_type)
    return inputs, {name: value for name, value in inputs.items() if name != without}


def write_reference(model_type: str) -> None:
    """Write the folder of one encoder."""
    import transformers

    folder, (inputs, read) = Path(__file__).parent / model_type, inputs_of(model_type, 50)
    config = transformers.AutoConfig.for_model(**CONFIGS[model_type] | SIZES)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # biases and LayerNorms too: a term of size 0 or 1 could hide
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        states = torch.stack(model(**read, output_hidden_states=True).hidden_states)  # (L+1, B, T, D)
    model.save_pretrained(folder)
    stored = inputs | {"hidden_states": states[:, inputs["attention_mask"] == 1]}
    save_file(stored, folder / "states.safetensors", metadata={"transformers": transformers.__version__})


def differences(folder: Path) -> tuple[float, float]:
    """The largest difference of hidden states, and of gradients as a share of the largest gradient of all."""
    import transformers

    config = read_config(folder, "cls")
    inputs, read = inputs_of(config.model_type, config.vocab_size)
    real = inputs["attention_mask"] == 1
    ours, theirs = load_encoder(folder, pooling="cls").eval(), transformers.AutoModel.from_pretrained(folder).eval()
    theirs.float()
    states = ours(*inputs.values()), theirs(**read, output_hidden_states=True).hidden_states
    of_states = max((a[real] - b[real]).abs().max().item() for a, b in zip(*states, strict=True))
    weights = torch.linspace(-1, 1, config.hidden_size)  # a loss that depends on every element
    for of_model in states:
        ((of_model[-1][real] * weights).tanh().sum() + of_model[1][real].square().mean()).backward()
    public = dict(theirs.named_parameters())
    pairs = [(p.grad, public[public_name(name, config.model_type)].grad) for name, p in ours.named_parameters()]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < len(pairs) - 1:  # all but, perhaps, one table that the loss does not reach
        raise ValueError(f"{len(pairs) - len(known)} parameters have no gradient")
    largest = max(b.abs().max().item() for _, b in known)
    return of_states, max((a - b).abs().max().item() for a, b in known) / largest


def main() -> None:
    """Compare, or make the references again."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--weights", metavar="MODEL", help="a preset, a folder or a hub id: compare it")
    args = parser.parse_args()
    if not args.weights:
        for model_type in CONFIGS:
            write_reference(model_type)
        return
    of_states, of_gradients = differences(model_folder(args.weights))
    print(f"{args.weights}: hidden states differ by at most {of_states:.1e}, gradients by {of_gradients:.1e}")
    sys.exit(max(of_states, of_gradients) > 1e-4)


if __name__ == "__main__":
    main()
