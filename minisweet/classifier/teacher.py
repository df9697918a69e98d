"""Two teachers of texts without labels: a model that has learnt the labels, and a regression on its first embeddings.

A model that learns its own answers (self-training) hears its errors again. The embeddings are means of its last layer
by the public weights, and fine-tuning on few rows forgets what they know. So a logistic regression on them errs on
other texts. On most lists the sum of both logits is right more often than either (.github/results/tried.md). It is
distilled as an ensemble is (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). It costs one pass of the texts and
some seconds for the fit, and at inference nothing.

Letters: B batch, T tokens, D hidden size, N texts, n of them labelled, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.base.commands import progress
from minisweet.base.devices import tokens_at_once
from minisweet.texts import Examples, Texts
from minisweet.layers import TransformerEncoder
from minisweet.outputs import BATCH_SIZE

STRENGTH, STEPS = 5.0, 60  # prior variance of each weight (the L2 penalty); steps of L-BFGS
TEMPERATURES = np.geomspace(0.5, 16, 41).tolist()  # to choose from


def embed(encoder: TransformerEncoder, tokenizer: Tokenizer, examples: Examples) -> Tensor:
    """The embeddings (N, D) of N texts; of pairs u, v [u, v, |u-v|, u*v], (N, 4D)."""
    u = means(encoder, tokenizer, examples.first)
    if examples.second is None:
        return u
    v = means(encoder, tokenizer, examples.second)
    return torch.cat([u, v, (u - v).abs(), u * v], 1)


@torch.inference_mode()
def means(encoder: TransformerEncoder, tokenizer: Tokenizer, strings: list[str]) -> Tensor:
    """The means (N, D) of N strings' last hidden states, of length 1."""
    texts, device = Texts(tokenizer, Examples(strings, None, None)), encoder.word_embeddings.weight.device
    rows, vectors = [], []
    with progress(total=len(texts), unit="text", desc="embeddings") as bar:
        for batch in texts.by_length(BATCH_SIZE, tokens_at_once(device)):
            ids, mask, types = batch.to(device).inputs
            sums = (encoder(ids, mask, types)[-1] * mask[..., None]).sum(1)  # (B, D); means are as long, normalised
            vectors.append(F.normalize(sums).cpu())
            rows.append(batch.rows)
            bar.update(len(batch.rows))
    return torch.cat(vectors)[torch.cat(rows).argsort()]


def regress(vectors: Tensor, targets: Tensor) -> Tensor:
    """A logistic regression, fitted to the first n of N vectors (N, D) by their targets (n, C): logits (N, C)."""
    n, C = targets.shape
    features = F.pad(vectors / vectors[:n].square().sum(1).mean().sqrt(), (0, 1), value=1.0)  # (N, D+1)
    weights = torch.zeros(features.shape[1], C, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = F.cross_entropy(features[:n] @ weights, targets, reduction="sum")
        value = (error + weights.square().sum() / STRENGTH / 2) / n
        value.backward()
        return value

    optimizer.step(loss)
    return features @ weights.detach()


def taught(logits: Tensor, second: Tensor) -> Tensor:
    """What a model's logits and the regression's, both (N, C), say together: probabilities (N, C).

    Fine-tuned on few rows a model is too sure. The labelled rows that it has not learnt would show by how much, and are
    kept to judge. So its temperature is the one at which its answers come nearest to the regression's.
    """
    targets = second.softmax(-1)
    best = min(TEMPERATURES, key=lambda temperature: float(F.cross_entropy(logits / temperature, targets)))
    return (logits / best + second).softmax(-1)
