"""minisweet: early exits for BERT, DeBERTa and MPNet, after "Finding the SWEET Spot" (Rotem et al. 2023).

To read and to study (B batch, T tokens, D hidden size, L layers, K exits, C classes):

    encoder = load_encoder("weights/minilm-l6")                  # any folder in Hugging Face's layout
    hidden = encoder(input_ids, attention_mask, token_type_ids)  # L+1 tensors (B, T, D): embeddings, each layer
    model = MultiExitModel(encoder, exit_layers=(1, 2, 3, 6), num_labels=2, method="sweet")  # or "ee"
    answers = model(input_ids, attention_mask, token_type_ids)   # K of them; call model.eval() first to predict
    answers[k].logits, answers[k].certainty                      # (B, C); (B,), or None without learning-to-exit
    model.heads[k].pooler, model.heads[k].classifier             # nn.Linear each, k from 0
    models = build_multi_model("weights/minilm-l6", exit_layers=(1, 2, 3, 6), num_labels=2)  # MM: a list

For your own text (see `help(EarlyExitClassifier)`):

    classify = EarlyExitClassifier(max_lost=3, sure=90).fit(texts, labels)
    classify.predict(["The printer is on fire"])
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# The public names, each imported from its module when it is first used, so that training loads no classifier.
_MODULES = {
    "EarlyExitClassifier": "classifier.estimator",
    "InputError": "base.files",
    "MultiExitModel": "exits",
    "NgramExit": "classifier.bag_of_words",
    "build_multi_model": "checkpoint",
    "load_encoder": "checkpoint",
    "tune_cpu": "fast",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'minisweet' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minisweet.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
