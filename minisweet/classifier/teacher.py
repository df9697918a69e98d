"""Two teachers for unlabelled texts: the fine-tuned model, and a logistic regression on the pre-trained embeddings.

A model that learns its own answers (self-training) also learns its own errors. The regression makes other errors: it
reads the mean last hidden state of the public weights, and fine-tuning on few rows forgets part of what they know. On
most data the sum of both logits is right more often than either (tried.md). The model learns from it, as in the
distillation of an ensemble (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). This takes one pass over the texts
and some seconds for the regression, and nothing at inference.

Dimension letters: B batch, T tokens, D hidden size, N texts, n of them labelled, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.base.commands import progress
from minisweet.base.devices import tokens_at_once
from minisweet.classifier.bag_of_words import minimize
from minisweet.layers import TransformerEncoder
from minisweet.outputs import BATCH_SIZE
from minisweet.texts import Texts

PRIOR_VARIANCE = 5.0  # of each weight (L2 penalty)
STEPS = 60  # of L-BFGS
TEMPERATURES = np.geomspace(0.5, 16, 41).tolist()  # to choose from


@torch.inference_mode()
def embed(encoder: TransformerEncoder, texts: Texts) -> Tensor:
    """The embeddings of N texts, (N, D): the mean of each one's last hidden states, scaled to length 1."""
    device = encoder.word_embeddings.weight.device
    rows, vectors = [], []
    with progress(total=len(texts), unit="text", desc="embeddings") as bar:
        for batch in texts.by_length(BATCH_SIZE, tokens_at_once(device)):
            ids, mask, types = batch.to(device).inputs
            sums = (encoder(ids, mask, types)[-1] * mask[..., None]).sum(1)  # (B, D); the length does not count
            vectors.append(F.normalize(sums).cpu())
            rows.append(batch.rows)
            bar.update(len(batch.rows))
    return torch.cat(vectors)[torch.cat(rows).argsort()]


def regress(vectors: Tensor, targets: Tensor) -> Tensor:
    """Fit a logistic regression to the first n of N vectors (N, D), and return the logits of all of them, (N, C).

    `targets` are the probabilities of these n, (n, C): one-hot for a label.
    """
    n, C = targets.shape
    features = F.pad(vectors / vectors[:n].square().sum(1).mean().sqrt(), (0, 1), value=1.0)  # (N, D+1)
    weights = torch.zeros(features.shape[1], C, requires_grad=True)

    def loss() -> Tensor:
        error = F.cross_entropy(features[:n] @ weights, targets, reduction="sum")
        return (error + weights.square().sum() / PRIOR_VARIANCE / 2) / n

    minimize(loss, [weights], STEPS)
    return features @ weights.detach()


def ensemble(logits: Tensor, second: Tensor) -> Tensor:
    """The probabilities (N, C) that the logits of the model and those of the regression, (N, C) each, give together.

    A model that was fine-tuned on few rows is overconfident. Held-out labelled rows would show by how much, but they
    are needed for validation. So its temperature is the one at which it agrees best with the regression.
    """
    targets = second.softmax(-1)
    best = min(TEMPERATURES, key=lambda temperature: float(F.cross_entropy(logits / temperature, targets)))
    return (logits / best + second).softmax(-1)
