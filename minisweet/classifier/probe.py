"""The exit of the model: linear on the mean of the tokens. It starts from a logistic regression, the probe.

Fine-tuning on few rows would destroy much of what public weights hold if it started from a random head.
So the head is first fitted to the frozen embeddings of the labelled rows, and then all layers train: linear probing,
then fine-tuning (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).

Dimension letters: B batch, T tokens, D hidden size, N texts, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.classifier.bag_of_words import minimize
from minisweet.classifier.training import run_all
from minisweet.exits import Answer, MultiExitModel, pool
from minisweet.layers import TransformerEncoder
from minisweet.texts import Texts

PRIOR_VARIANCE = 5.0  # of each weight of the regression (L2 penalty)
STEPS = 100  # of L-BFGS


class LinearHead(nn.Module):
    """The exit: a linear layer on the mean of the tokens, which is scaled to length 1."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_labels)

    def forward(self, x: Tensor) -> Answer:
        """The mean (B, D) to logits (B, C), in float32 even where layers run in half precision."""
        with torch.autocast(x.device.type, enabled=False):
            return Answer(self.linear(F.normalize(x.float())))


def with_linear_head(encoder: TransformerEncoder, num_labels: int) -> MultiExitModel:
    """A model of an encoder that pools the mean, with one exit, a `LinearHead`, at its end."""
    depth = len(encoder.layers)
    model = MultiExitModel(encoder, (depth,), num_labels)
    head = LinearHead(encoder.config.hidden_size, num_labels)
    model.heads = nn.ModuleList([head.to(encoder.word_embeddings.weight)])  # the encoder's device and type
    return model


def embed(encoder: TransformerEncoder, texts: Texts) -> Tensor:
    """The embeddings of N texts, (N, D): the mean of each one's last hidden states, scaled to length 1."""

    def step(ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        return F.normalize(pool(encoder(ids, mask, types)[-1], mask, "mean"))

    return run_all(step, texts, encoder.word_embeddings.weight.device, title="embeddings")


@torch.no_grad()
def fit_probe(head: nn.Module, vectors: Tensor, labels: Tensor) -> None:
    """Fit a `LinearHead` in place to embeddings (N, D) and labels (N,), by a logistic regression.

    It has an L2 penalty on the weights, starts from zeros and draws no random numbers.
    """
    weights, bias = (torch.zeros_like(part, requires_grad=True) for part in head.parameters())

    def loss() -> Tensor:
        error = F.cross_entropy(F.linear(vectors, weights, bias), labels, reduction="sum")
        return (error + weights.square().sum() / PRIOR_VARIANCE / 2) / len(labels)

    minimize(loss, [weights, bias], STEPS)
    head.load_state_dict({"linear.weight": weights, "linear.bias": bias})
