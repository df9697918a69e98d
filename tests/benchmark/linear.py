"""What one would use in place of ours: a logistic regression on TF-IDF, on a static model or on embeddings; SetFit.

TF-IDF counts words, pairs of words, and three to five characters within words. Embeddings are MiniLM's mean-pooled last
layer, normalised, as its sentence-transformers model makes them: they cost all layers. The static model is model2vec's,
distilled from the same MiniLM: a vector for each token, and no layer. A pair of texts u, v is
[u, v, |u-v|, u*v], as usual. The regression's strength is chosen by cross-validation on the training rows. SetFit
fine-tunes the same MiniLM on 20 pairs for each row on either side, with its library's defaults else.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import numpy as np

from minisweet import load_encoder
from minisweet.classifier import teacher
from minisweet.texts import Examples, load_tokenizer
from minisweet.hub import model_folder

LINEAR = {"tfidf": "TF-IDF", "static": "model2vec", "embeddings": "embeddings"}  # by the names of the archive's records
LINEAR |= {"both": "TF-IDF and embeddings", "setfit": "SetFit"}
PACKAGES = {"model2vec": "model2vec", "SetFit": "setfit"}
STRENGTHS = (1, 10, 100)


def is_there(name: str) -> bool:
    """Whether what one of LINEAR needs is installed."""
    return name not in PACKAGES or find_spec(PACKAGES[name]) is not None


@cache
def minilm() -> tuple:
    """MiniLM's encoder, and its tokenizer."""
    encoder = load_encoder(folder := model_folder("minilm-l6")).eval()
    return encoder, load_tokenizer(folder, encoder.config.vocab_size, 256)


def embed(texts: list[str]) -> np.ndarray:
    """Texts (N,) to normalised means of MiniLM's last hidden states: (N, D)."""
    return teacher.embed(*minilm(), Examples(texts, None, None)).numpy()


@cache
def static_model():
    """model2vec's static model, distilled from MiniLM."""
    from model2vec.distill import distill

    return distill(model_name=str(model_folder("minilm-l6")))


def fit_linear(name: str, train: Examples, strengths: Sequence[float] = STRENGTHS) -> Callable[[Examples], np.ndarray]:
    """Fit one of LINEAR. Returns what answers other rows: (N,)."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import FeatureUnion

    if name == LINEAR["setfit"]:
        return fit_setfit(train)
    to_vectors = embed
    if name == LINEAR["static"]:
        to_vectors = static_model().encode
    if name in (LINEAR["tfidf"], LINEAR["both"]):
        words, letters = TfidfVectorizer(ngram_range=(1, 2)), TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5))
        union = FeatureUnion([("words", words), ("letters", letters)]).fit(train.first + (train.second or []))
        to_vectors = union.transform
    if name == LINEAR["both"]:

        def to_vectors(texts: list[str]):
            return sparse.hstack([union.transform(texts), embed(texts)]).tocsr()

    vectors = features(train, to_vectors)
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": strengths}, cv=3).fit(vectors, train.labels)
    return lambda rows: search.predict(features(rows, to_vectors))


def fit_setfit(train: Examples) -> Callable[[Examples], np.ndarray]:
    """Fit SetFit to single texts."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    model = SetFitModel.from_pretrained(str(model_folder("minilm-l6")))
    rows = Dataset.from_dict({"text": train.first, "label": train.labels})
    with TemporaryDirectory() as folder:
        told = TrainingArguments(output_dir=folder, num_iterations=20, num_epochs=1, save_strategy="no")
        Trainer(model=model, args=told, train_dataset=rows).train()
    return lambda rows: np.array(model.predict(rows.first))


def features(rows: Examples, to_vectors):
    """Vectors of N texts or pairs: (N, size), an array or a sparse one."""
    from scipy import sparse

    u = to_vectors(rows.first)
    if rows.second is None:
        return u
    v = to_vectors(rows.second)
    stack = sparse.hstack if sparse.issparse(u) else np.hstack
    both = stack([u, v, abs(u - v), u.multiply(v) if sparse.issparse(u) else u * v])
    return sparse.csr_array(both) if sparse.issparse(u) else both
