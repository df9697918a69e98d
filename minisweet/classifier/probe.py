"""The model: an encoder with one exit at its end, which starts from a logistic regression, the probe.

Fine-tuning on few rows would destroy much of what public weights hold if it started from a random head.
So the head is first fitted to the frozen embeddings of the labelled rows, and then all layers train: linear probing,
then fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).

Dimension letters: B batch, T tokens, D hidden size, N texts, C classes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.base.files import InputError, read_json
from minisweet.checkpoint import load_parts
from minisweet.classifier.bag_of_words import minimize
from minisweet.exits import ExitHead, pool
from minisweet.layers import TransformerEncoder
from minisweet.loading import read_config

PRIOR_VARIANCE = 5.0  # of each weight of the regression (L2 penalty)
STEPS = 100  # of L-BFGS


class FullModel(nn.Module):
    """An encoder with one exit at its end.

    The `head` that `fit` trains is an `nn.Linear` on the mean of the tokens, scaled to length 1. That of a classifier
    which was fine-tuned elsewhere is an `ExitHead`, on what the encoder's config says.
    """

    def __init__(self, encoder: TransformerEncoder, head: nn.Linear | ExitHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The logits (B, C) of texts, (B, T) each. A linear head is in float32 even if layers are in half precision."""
        vector = self.pooled(input_ids, attention_mask, token_type_ids)
        if isinstance(self.head, ExitHead):
            return self.head(vector).logits
        with torch.autocast(vector.device.type, enabled=False):
            return self.head(F.normalize(vector.float()))

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The head's input (B, D), from three inputs of shape (B, T)."""
        hidden, context = self.encoder.embed(input_ids, token_type_ids), self.encoder.context(attention_mask)
        for layer in self.encoder.layers:
            hidden = layer(hidden, context)  # (B, T, D)
        return pool(hidden, attention_mask, self.encoder.config.pooling)


@torch.no_grad()
def fit_probe(head: nn.Module, vectors: Tensor, labels: Tensor) -> None:
    """Fit a linear head in place to embeddings (N, D) of length 1 and labels (N,), by a logistic regression.

    It has an L2 penalty on the weights, starts from zeros and draws no random numbers.
    """
    weights, bias = (torch.zeros_like(part, requires_grad=True) for part in head.parameters())

    def loss() -> Tensor:
        error = F.cross_entropy(F.linear(vectors, weights, bias), labels, reduction="sum")
        return (error + weights.square().sum() / PRIOR_VARIANCE / 2) / len(labels)

    minimize(loss, [weights, bias], STEPS)
    head.load_state_dict({"weight": weights, "bias": bias})


def load_classifier(folder: Path) -> tuple[FullModel, list]:
    """Load a classifier in the Hugging Face layout, with its labels: those of id2label, or LABEL_0 and LABEL_1.

    Raises InputError if it cannot be read, or is a model for another task.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; should be a run, or a classifier of Hugging Face", "trunk")
    path = folder / "config.json"
    content = read_json(path)
    names = content.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = [names.get(str(n)) for n in range(len(names))] if isinstance(names, dict) else []
    if not labels or len({label for label in labels if isinstance(label, str)}) < len(labels):
        raise InputError(f"{path}: id2label is {names!r:.120}, should give the classes 0, 1, ... a text each")
    wanted, problem_type = "single_label_classification", content.get("problem_type")
    if problem_type not in (wanted, None) or len(labels) < 2:
        raise InputError(f"{path}: {problem_type} with {len(labels)} outputs, should be {wanted} with two or more")
    encoder, linear = load_parts(folder, read_config(folder, "cls"), num_labels=len(labels))
    head = ExitHead(encoder, len(labels))  # whose pooler is the checkpoint's
    head.classifier.load_state_dict(linear["classifier"].state_dict())
    return FullModel(encoder, head).eval(), labels
