"""minisweet: early-exit fine-tuning of BERT, DeBERTa and MPNet, after "Finding the SWEET Spot" (Rotem et al. 2023).

Names and shapes that stay (B batch, T tokens, D hidden size, L layers, K exits, C classes):

    encoder = load_encoder("weights/minilm-l6")                  # any folder in Hugging Face's layout
    hidden = encoder(input_ids, attention_mask, token_type_ids)  # L+1 tensors (B, T, D): embeddings, each layer
    model = MultiExitModel(encoder, exit_layers=(1, 2, 3, 6), num_labels=2, method="sweet")  # or "ee"; BranchModel
    logits = model(input_ids, attention_mask, token_type_ids)    # (K, B, C); call model.eval() first to predict
    model.heads[k].pooler, model.heads[k].classifier             # nn.Linear each, k from 0
    models = build_multi_model("weights/minilm-l6", exit_layers=(1, 2, 3, 6), num_labels=2)  # MM: answers likewise
    model.add_ngrams(NgramExit(...))                             # exit 0, a bag of words: then (K+1, B, C)
"""

import os
import signal
import sys

__version__ = "0.1.0"

if (  # it is a command, `minisweet` or `python -m minisweet`; whoever imports it keeps their own Ctrl-C
    (os.path.basename(sys.argv[0]) == "minisweet" or (sys.argv[0] == "-m" and "minisweet" in sys.orig_argv))
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while torch is imported; then see `run_command`

from minisweet.base.devices import tune_cpu
from minisweet.base.files import InputError
from minisweet.checkpoint import load_encoder
from minisweet.exits import MultiExitModel
from minisweet.methods import build_multi_model
from minisweet.ngrams import NgramExit
from minisweet.use.classifier import EarlyExitClassifier

__all__ = ["EarlyExitClassifier", "InputError", "MultiExitModel", "NgramExit", "build_multi_model", "load_encoder"]
__all__ += ["tune_cpu"]
