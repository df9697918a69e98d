"""What one would use in place of ours: a logistic regression on TF-IDF, on embeddings (also static ones), or on both.

TF-IDF counts words, pairs of words, and three to five characters within words. Embeddings are MiniLM's mean-pooled last
layer, normalized: they cost all layers. The regression's strength is chosen by cross-validation; folds share no group.
Static embeddings, a vector per token, are made of MiniLM's by model2vec (`pip install 'model2vec[distill]'`):

    python -c "from model2vec.distill import distill; distill('weights/minilm-l6').save_pretrained('weights/static')"
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet import load_encoder
from minisweet.classifier.cascade import run_all
from minisweet.exits import pool
from minisweet.hub import home, model_folder
from minisweet.texts import Examples, Texts, load_tokenizer

RIVALS = (TFIDF, EMBEDDINGS, BOTH) = ("TF-IDF", "embeddings", "TF-IDF and embeddings")
STATIC, STATIC_FOLDER = "static embeddings", home() / "weights" / "static"
Answer = Callable[[Examples], np.ndarray]  # of other rows: (N,)


@cache
def minilm() -> tuple:
    """MiniLM's encoder, and its tokenizer."""
    encoder = load_encoder(folder := model_folder("minilm-l6")).eval()
    return encoder, load_tokenizer(folder, encoder.config.vocab_size, 256)


def embed(texts: list[str]) -> np.ndarray:
    """Texts (N,) to normalized means of MiniLM's last hidden states: (N, D)."""
    encoder, tokenizer = minilm()

    def step(ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        return F.normalize(pool(encoder(ids, mask, types)[-1], mask, "mean"))

    return run_all(step, Texts(tokenizer, Examples(texts, None, None)), torch.device("cpu")).numpy()


def fit_rival(name: str, train: Examples) -> Answer:
    """Fit one of RIVALS, or STATIC."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import FeatureUnion

    to_vectors = embed
    if name == STATIC:
        from model2vec import StaticModel

        to_vectors = StaticModel.from_pretrained(STATIC_FOLDER).encode
    elif name != EMBEDDINGS:
        words, letters = TfidfVectorizer(ngram_range=(1, 2)), TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5))
        union = FeatureUnion([("words", words), ("letters", letters)]).fit(train.first)
        to_vectors = union.transform
    if name == BOTH:

        def to_vectors(texts: list[str]):
            return sparse.hstack([union.transform(texts), embed(texts)]).tocsr()

    vectors = to_vectors(train.first)
    folds = StratifiedGroupKFold(3) if train.groups else 3
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": [1, 10, 100]}, cv=folds)
    search.fit(vectors, train.labels, groups=train.groups)
    return lambda rows: search.predict(to_vectors(rows.first))
