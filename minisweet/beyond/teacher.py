"""The teacher of texts without labels: what a model says once it has learnt the labels, and its embeddings before that.

A model that learns its own answers (self-training) hears its errors again. A logistic regression on sentence embeddings
errs elsewhere: they are the means of the last layer by the public weights, which fine-tuning on few rows forgets. The
sum of both logits is mostly right more often than either (.github/results/tried.md), and is distilled as an ensemble is
(Hinton et al. 2015, https://arxiv.org/abs/1503.02531). It costs one pass of the texts and a second for the fit, and at
inference nothing.

Letters: B batch, T tokens, D hidden size, N texts, n of them labelled, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.base.commands import progress
from minisweet.data.text import Examples, Texts
from minisweet.layers import TransformerEncoder
from minisweet.outputs import BATCH_SIZE, CPU_TOKENS

STRENGTH, STEPS = 5.0, 60  # prior variance of each weight (the L2 penalty); steps of L-BFGS
TEMPERATURES = np.geomspace(0.5, 16, 41)  # to choose from


@torch.inference_mode()
def embed(encoder: TransformerEncoder, tokenizer: Tokenizer, examples: Examples) -> Tensor:
    """The means (N, D) of N texts' last hidden states, of length 1; of pairs u, v [u, v, |u-v|, u*v], (N, 4D)."""
    sides, device = [], encoder.word_embeddings.weight.device
    for strings in (examples.first, examples.second):
        if strings is None:
            return sides[0]
        texts, vectors = Texts(tokenizer, Examples(strings, None, None)), []
        with progress(total=len(texts), unit="text", desc="embeddings") as bar:
            for batch in texts.by_length(BATCH_SIZE, CPU_TOKENS):
                mask = batch.attention_mask.to(device)[..., None]  # (B, T, 1)
                means = (encoder(*batch.to(device).inputs)[-1] * mask).sum(1) / mask.sum(1)
                vectors.append((batch.rows, F.normalize(means).float().cpu()))
                bar.update(len(batch.rows))
        rows, vectors = (torch.cat(its) for its in zip(*vectors, strict=True))
        sides.append(vectors[rows.argsort()])
    u, v = sides
    return torch.cat([u, v, (u - v).abs(), u * v], 1)


def regress(vectors: Tensor, targets: Tensor) -> Tensor:
    """A logistic regression, fitted to the first n of N vectors (N, D) by their targets (n, C): logits (N, C)."""
    known = vectors[: len(targets)]
    features = F.pad(vectors / known.square().sum(1).mean().sqrt(), (0, 1), value=1.0)  # (N, D+1)
    weights = torch.zeros(features.shape[1], targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = -(targets * (features[: len(targets)] @ weights).log_softmax(-1)).sum()
        value = (error + weights.square().sum() / STRENGTH / 2) / len(targets)
        value.backward()
        return value

    optimizer.step(loss)
    return features @ weights.detach()


def taught(logits: Tensor, second: Tensor) -> Tensor:
    """What a model's logits and the regression's, both (N, C), say together: probabilities (N, C).

    Fine-tuned on few rows a model is too sure. No row is left to show by how much, so it is made as sure as the
    regression finds it right: its temperature is that at which its answers are nearest to the regression's.
    """
    targets = second.softmax(-1)
    scaled = [logits / float(temperature) for temperature in TEMPERATURES]
    nearest = min(scaled, key=lambda its: float(F.cross_entropy(its, targets)))
    return (nearest + second).softmax(-1)
