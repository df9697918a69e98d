"""minisweet: early-exit fine-tuning of BERT, DeBERTa and MPNet, after "Finding the SWEET Spot" (Rotem et al. 2023).

For your own text (see `help(EarlyExitClassifier)`):

    classify = EarlyExitClassifier(max_lost=3, sure=90).fit(texts, labels)
    classify.predict(["The printer is on fire"])

To read and to study (B batch, T tokens, D hidden size, L layers, K exits, C classes):

    encoder = load_encoder("weights/minilm-l6")                  # any folder in Hugging Face's layout
    hidden = encoder(input_ids, attention_mask, token_type_ids)  # L+1 tensors (B, T, D): embeddings, each layer
    model = MultiExitModel(encoder, exit_layers=(1, 2, 3, 6), num_labels=2, method="sweet")  # or "ee"; BranchModel
    logits = model(input_ids, attention_mask, token_type_ids)    # (K, B, C); call model.eval() first to predict
    model.heads[k].pooler, model.heads[k].classifier             # nn.Linear each, k from 0
    models = build_multi_model("weights/minilm-l6", exit_layers=(1, 2, 3, 6), num_labels=2)  # MM: answers likewise
    model.add_ngrams(NgramExit(...))                             # exit 0, a bag of words: then (K+1, B, C)
"""

__version__ = "0.1.0"

from minisweet.base.devices import tune_cpu
from minisweet.base.files import InputError
from minisweet.branches import BranchModel
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.checkpoint import load_encoder
from minisweet.exits import MultiExitModel
from minisweet.methods import build_multi_model
from minisweet.classifier.estimator import EarlyExitClassifier

__all__ = ["BranchModel", "EarlyExitClassifier", "InputError", "MultiExitModel", "NgramExit", "build_multi_model"]
__all__ += ["load_encoder", "tune_cpu"]
