"""train.py and evaluate.py as a user runs them, on tiny models."""

import errno
import json
import os
import pathlib
import platform
import re
import shutil
import textwrap
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import evaluate
import minisweet
import train
from minisweet import EarlyExitClassifier
from minisweet.adaptive import Exits
from minisweet.base import devices
from minisweet.base.devices import choose_precision, tune_cpu
from minisweet.branches import METHODS
from minisweet.evaluation.sweep import Validation
from minisweet.layers import float32_by_onednn
from minisweet.runs.folders import load_run, newest_run
from minisweet.use import explain, predict
from tests.conftest import DEBERTA_IS_SLOW, quick, random_batch, write_model
from tests.test_runs import trust

KEYS = "task metric method exit_layers exit_scores thresholds scores speedup_ratios exit_counts area".split()


@DEBERTA_IS_SLOW
@pytest.mark.parametrize("method", METHODS)
def test_train_and_evaluate(command, model_dir, method):
    status, out, err = command(train, *quick(model_dir, "--method", method, "--seed", 3))
    assert (status, "Traceback" in err) == (0, False)
    assert "learning rate 0.0002" in out
    run = newest_run()
    assert run.name == f"tiny-{method}-toy-seed3"
    assert not list(run.parent.glob(".*"))
    record = json.loads((run / "run.json").read_text())
    assert record["arguments"]["method"] == method
    assert len(record["subset"]) == 48 == len(set(record["subset"]))
    assert np.shape(record["losses"]) == (6, 3)
    assert {"torch", "tokenizers", "python"} <= set(record["versions"])

    status, out, err = command(evaluate, "--thresholds", 5, "--live", "--calibration", "dev")
    assert (status, "Traceback" in err) == (0, False)
    result = json.loads((run / "evaluation.json").read_text())
    assert set(KEYS) <= set(result)
    assert result["scores"][0] == result["exit_scores"][0]  # all leave at the first exit
    assert result["scores"][-1] == result["exit_scores"][-1]  # all reach the last
    assert result["exit_counts"][0] == [200, 0, 0]
    assert result["exit_counts"][-1] == [0, 0, 200]
    costs = {"mm": [1, 3, 7], "branch": [1, 2 + 1 / 6, 4 + 2 / 6]}.get(method, [1, 2, 4])  # in layers
    ratios = [np.dot(counts, costs) / 4 / 200 for counts in result["exit_counts"]]
    ratios[-1] = 7 / 4 if method == "mm" else 1  # at threshold 1 no branch is asked
    assert result["speedup_ratios"] == pytest.approx(ratios)
    assert result["exit_counts"][-2][2] > 0  # so that below threshold 1 some have asked all branches
    assert len(result["thresholds"]) == len(result["scores"]) == 5
    assert all(sum(counts) == 200 for counts in result["exit_counts"])
    assert "mean exit layer per difficulty" in out
    assert "differ from the sweep's in 0 of 1000 decisions" in out
    shares = [row["layer_share"] for row in result["live"]]
    assert shares == pytest.approx(result["speedup_ratios"])
    assert command(evaluate, run, "--thresholds", 2)[0] == 0  # renews its own file


@DEBERTA_IS_SLOW
@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
def test_learning_to_exit(command, model_dir, method):
    assert command(train, *quick(model_dir, "--method", method, "--exit-strategy", "lte"))[0] == 0
    run = newest_run()
    assert run.name == f"tiny-{method}-toy-seed0-lte"
    record = json.loads((run / "run.json").read_text())
    assert record["arguments"]["exit_strategy"] == "lte"
    assert np.min(record["losses"]) > 0.693 - 0.3  # cross-entropy near log 2, and a squared error near a quarter
    assert np.mean(record["losses"]) > 0.693 + 0.1
    status, out, _ = command(evaluate, "--thresholds", 5, "--live")
    assert (status, "differ from the sweep's in 0 of 1000 decisions" in out) == (0, True)
    result = json.loads((run / "evaluation.json").read_text())
    assert result["thresholds"] == [0, 0.25, 0.5, 0.75, 1]
    assert (result["exit_counts"][0], result["exit_counts"][-1]) == ([200, 0, 0], [0, 0, 200])
    assert np.shape(result["certainty_ranges"]) == (3, 2)
    asked = result["certainty_ranges"][: 2 if method == "branch" else 3]  # nobody asks a branch model's last exit
    assert all(0 < low < high < 1 for low, high in asked)


def test_a_run_is_not_overwritten_unless_told(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "a"))[0] == 0
    before = (tmp_path / "a" / "run.json").read_text()
    status, _, err = command(train, *quick(model, "--out", "a"))
    assert status == 2
    assert err.endswith("error: --out: a holds a run already; name another folder, or pass --overwrite\n")
    assert (tmp_path / "a" / "run.json").read_text() == before
    assert command(train, *quick(model, "--out", "a", "--overwrite", "--seed", 1))[0] == 0
    assert json.loads((tmp_path / "a" / "run.json").read_text())["arguments"]["seed"] == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious.txt").write_text("mine")
    status, _, err = command(train, *quick(model, "--out", "b", "--overwrite"))
    assert (status, (tmp_path / "b" / "precious.txt").read_text()) == (2, "mine")
    assert "b holds other files than a run" in err


def test_the_same_seed_gives_the_same_run_and_the_same_subset_for_every_method(command, tmp_path):
    model = write_model(tmp_path / "tiny", "deberta")
    for name, arguments in {"a": [], "b": [], "c": ["--method", "mm"], "d": ["--seed", 1]}.items():
        assert command(train, *quick(model, "--out", name, *arguments))[0] == 0
    records = {name: json.loads((tmp_path / name / "run.json").read_text()) for name in "abcd"}
    assert records["a"]["losses"] == records["b"]["losses"]
    assert records["a"]["subset"] == records["c"]["subset"] != records["d"]["subset"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_learns_and_decays_to_zero(command, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self)
    )
    model = write_model(tmp_path / "tiny", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    arguments = quick(model, "--out", "a", "--lr", "1e-2", "--epochs", 60, "--train-size", 16)
    assert command(train, *arguments)[0] == 0
    losses = json.loads((tmp_path / "a" / "run.json").read_text())["losses"]
    assert sum(losses[-1]) < 0.8 * sum(losses[0])
    assert rates == pytest.approx([1e-2 * (1 - n / 60) for n in range(60)])


@pytest.mark.parametrize("method", METHODS)
def test_one_example_is_enough(command, tmp_path, method):
    model = write_model(tmp_path / "tiny", "bert")
    arguments = ["--method", method, "--train-size", 1, "--epochs", 3, "--exit-strategy", "lte", "--out", "a"]
    assert command(train, *quick(model, *arguments))[0] == 0
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (len(record["subset"]), np.shape(record["losses"])) == (1, (3, 3))


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision_trains_close_to_float32(command, tmp_path, model_type, amp):
    model = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = {}
    for name in ("off", amp):
        assert command(train, *quick(model, "--out", name, "--amp", name, "--device", "cpu"))[0] == 0
        losses[name] = np.array(json.loads((tmp_path / name / "run.json").read_text())["losses"])
        assert command(evaluate, name, "--amp", amp)[0] == 0
    assert np.abs(losses[amp] - losses["off"]).max() < 0.1
    assert (losses[amp] != losses["off"]).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_cuda(command, tmp_path, model_type, amp):
    model = write_model(tmp_path / "tiny", model_type)
    assert command(train, *quick(model, "--out", "a", "--amp", amp, "--device", "cuda"))[0] == 0
    assert command(evaluate, "a", "--amp", amp, "--device", "cuda")[0] == 0


def test_a_save_that_is_interrupted_leaves_the_finished_training_alone(command, tmp_path, monkeypatch):
    model = write_model(tmp_path / "tiny", "bert")
    monkeypatch.setattr("minisweet.runs.folders.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    status, _, err = command(train, *quick(model, "--out", "runs/a"))
    assert (status, err.splitlines()[-1]) == (130, "interrupted")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".a.checkpoint"]


BAD = {
    ("--model", "no-such"): "'no-such'",
    ("--method", "sweeet"): "sweeet",
    ("--task", "wnli"): "wnli",
    ("--train-size", "0"): "--train-size: '0' is not a whole number from 1 to",
    ("--epochs", "-1"): "--epochs",
    ("--batch-size", "x"): "--batch-size: 'x'",
    ("--lr", "nan"): "--lr: 'nan' is not a positive number",
    ("--seed", "-1"): "--seed: '-1'",
    ("--exit-layers", "1,x"): "--exit-layers: 'x' is not a whole number",
    ("--exit-layers", "4,1"): "--exit-layers",
    ("--exit-layers", "1,9"): "must be increasing layers in 1 to 4",
    ("--max-length", "7"): "--max-length: '7'",
    ("--seed", "9" * 5000): "--seed",
    ("--lr", "1e30"): "--lr: at 1e+30 the loss is",
    ("--out", "."): "--out: . holds other files",
    ("--out", "tiny/vocab.txt/x"): "--out: tiny/vocab.txt/x cannot be written",
    ("--out", "x" * 250): "cannot be written",
    ("--max-length", "41"): "--max-length: 41, and",
    ("--device", "tpu"): "--device: 'tpu'",
    ("--device", "cuda:99"): "--device: 'cuda:99'",
    ("--amp", "int8"): "--amp",
    ("--trainsize", "5"): "unrecognized arguments",
    ("--lr", "1_0"): "--lr: '1_0' is not a positive number",
    ("--max-length=--",): "--max-length: '--' where a value should stand",
    ("--gradient-flow", "0.5"): "unrecognized arguments",  # of an earlier version
    ("--targets", "trunk"): "--targets: trunk needs --trunk or --method branch",
    ("--branch-lr-factor", "3"): "--branch-lr-factor: 3.0 needs --method branch",
    **{(option, "a"): f"{option}: a needs --data" for option in ("--dev-data", "--label-column")},
    **{(option, "a,b"): f"{option}: a,b needs --data" for option in ("--text-columns", "--labels")},
    ("--dev-size", "0.5"): "--dev-size: 0.5 needs --data",
    ("--data", "a.csv", "--data-dir", "glue"): "--data-dir: glue needs a task, and --data is given",
    ("--resume", "--out", "/"): "--out: / cannot be written",
    ("--data", "a.csv", "--dev-data", "b.csv", "--dev-seed", "1"): "--dev-seed: 1 needs rows of --data, and --dev-data",
    ("--model", ""): "model '': neither a folder",
    ("--trunk", "tiny"): "tiny",
    ("--branch-lr-factor", "0"): "--branch-lr-factor: '0' is not a positive number",
}


def test_a_last_step_that_breaks_the_weights_is_no_training_to_resume(command, tmp_path, monkeypatch):
    model, update, steps = write_model(tmp_path / "tiny", "bert"), train.update, iter(range(10))

    def break_the_last(optimizer, *rest):
        update(optimizer, *rest)
        if next(steps) == 5:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(torch.nan)

    monkeypatch.setattr(train, "update", break_the_last)
    status, _, err = command(train, *quick(model, "--out", "a"))
    assert (status, "the last step made NaN or infinity of weights" in err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "tiny"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["diverged.json"]


def test_too_little_memory_is_one_line(command, monkeypatch):
    def allocate():
        torch.empty(10**15)

    status, _, err = command(SimpleNamespace(__name__="train", main=allocate))
    assert (status, "too little memory" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(("bad", "message"), BAD.items())
def test_bad_input_is_one_line_and_status_2(command, tmp_path, bad, message):
    model = write_model(tmp_path / "tiny", "bert")
    status, out, err = command(train, *quick(model, "--out", "a", *bad))
    assert status == 2
    if bad[0] == "--lr" and "1e30" in bad:  # seen only in training, after its first words
        err = err.splitlines(keepends=True)[-1]
    else:
        assert out == ""
    assert err.count("\n") == 1
    assert message in err
    if "1e30" in bad:  # leaves word of it, for a grid's search
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["diverged.json"]
        shutil.rmtree(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_evaluate_refuses_what_is_no_run(command, tmp_path):
    status, _, err = command(evaluate)
    assert (status, err) == (
        2,
        "evaluate.py: error: runs/: no run here; train one with train.py, or name a run folder\n",
    )
    assert command(evaluate, tmp_path)[0] == 2
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "runs/a"))[0] == 0
    status, _, err = command(evaluate, "--thresholds", 1)
    assert (status, err.count("\n")) == (2, 1)
    assert "--thresholds: '1' is not a whole number from 2 to 10001" in err
    (tmp_path / "runs" / "a" / "model.safetensors").write_bytes(b"cut")
    status, _, err = command(evaluate)
    assert (status, err.count("\n")) == (2, 1)
    assert "runs/a" in err


def test_a_saved_run_answers_like_the_model_that_was_trained(command, tmp_path, model_type):
    model = write_model(tmp_path / "tiny", model_type)
    assert command(train, *quick(model, "--out", "a", "--exit-layers", "1,3"))[0] == 0
    loaded, record = load_run(tmp_path / "a")
    assert (loaded.exit_layers, record.depth, len(loaded.encoder.layers)) == ((1, 3), 4, 3)
    assert command(evaluate, "a")[0] == 0
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["speedup_ratios"][-1] == pytest.approx(3 / 4)


def test_auto_precision_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_precision("auto", cpu) is None
    assert choose_precision("bf16", cpu) is torch.bfloat16
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda yes=supported, **_: yes)
        assert choose_precision("auto", cuda) is dtype
    assert choose_precision("off", cuda) is None


def precisions() -> tuple:
    """What torch tells of products in float32; it raises where that was set in ways that do not go together."""
    backends = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.mkldnn.matmul.fp32_precision,
        backends.cuda.matmul.fp32_precision,
    )


class Rounds(TorchFunctionMode):
    """Within, one kind of product is rounded to bfloat16."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func, types, args=(), kwargs=None):
        product = func(*args, **(kwargs or {}))
        kind = None
        if func is torch.nn.functional.linear:
            kind = "one row" if len(args[0]) == 1 else "linear"
        elif func is torch.Tensor.matmul:
            kind = "batch" if product.dim() == 3 else "gradient of x" if args[0].is_contiguous() else "gradient of W"
        return product.bfloat16().float() if kind == self.kind else product


needs_onednn = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="before 2.9 torch leaves no float32 to oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("rounded", ["", "linear", "one row", "gradient of x", "gradient of W", "batch"])
@pytest.mark.parametrize("has", [{"avx512_bf16"}, {"avx512_bf16", "amx_tile"}, set()])
def test_onednn_multiplies_float32_only_where_it_rounds_nothing(monkeypatch, has, rounded):
    rounds = bool(rounded) or "amx_tile" in devices.processor()[1]  # with AMX oneDNN does, whatever is claimed here
    monkeypatch.setattr(devices, "processor", lambda: ("any", has))
    before = precisions()
    with Rounds(rounded):
        tune_cpu()
    assert float32_by_onednn() == (has == {"avx512_bf16"} and not rounds)
    assert precisions()[0] == ("medium" if float32_by_onednn() else "highest")  # torch can still tell
    if not float32_by_onednn():
        assert precisions() == before
    fine = 1 + 2**-20 * torch.arange(256.0).expand(256, 256)
    assert torch.equal(fine @ torch.eye(256), fine)


@needs_onednn
def test_a_precision_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setattr(devices, "processor", lambda: ("any", {"avx512_bf16"}))
    torch.set_float32_matmul_precision("high")
    before = precisions()
    tune_cpu()
    assert precisions() == before
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


def test_nothing_hangs_on_names_inside_torch(monkeypatch):
    """Whatever torch renames, the processor is asked in another way, and where it cannot be, nothing is switched."""
    name, has = devices.processor()
    for private in [name for name in dir(torch.cpu) if name.startswith("_is_")]:
        monkeypatch.delattr(torch.cpu, private)
    assert devices.processor() == (name, has)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if pathlib.Path("/proc/cpuinfo").exists():
        assert has & {"avx512_bf16", "amx_tile"} == devices.processor()[1] & {"avx512_bf16", "amx_tile"}
    tune_cpu()
    monkeypatch.setattr(pathlib.Path, "read_text", pathlib.Path.rmdir)  # raises OSError
    assert devices.processor() == (f"{platform.machine()} CPU", set())
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    tune_cpu()


def test_the_last_written_run_is_the_newest_and_half_written_ones_are_none(tmp_path):
    for age, name in enumerate(("z", "a", ".c.17.partial", "m")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        os.utime(tmp_path / name / "run.json", (100 - age, 100 + age if name != "m" else 99))
    (tmp_path / "h" / "run.json").mkdir(parents=True)
    assert newest_run(tmp_path).name == "a"
    half = tmp_path / ".k.0123456789abcdef.partial" / "old"  # killed while it replaced the run k
    half.mkdir(parents=True)
    (half / "run.json").write_text("{}")
    assert newest_run(tmp_path) == tmp_path / "k"


def test_an_overwritten_folder_must_hold_nothing_but_a_run(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "a"))[0] == 0
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert command(train, *quick(model, "--out", "a", "--overwrite"))[0] == 2
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert command(train, *quick(model, "--out", "link"))[0] == 0
    assert command(train, *quick(model, "--out", "link", "--overwrite", "--seed", 7))[0] == 0
    assert json.loads((tmp_path / "b" / "run.json").read_text())["arguments"]["seed"] == 7
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("arguments", {"task": "wnli"}),
        ("arguments", {"task": None}),
        ("arguments", {"method": "x"}),
        ("arguments", {"model": 1}),
        ("arguments", {"max_length": "20"}),
        ("exit_layers", 4),
        ("exit_layers", [1.0]),
        ("exit_layers", [1, 9]),
        ("arguments", []),
    ],
)
def test_a_changed_run_json_is_refused(command, tmp_path, key, value):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "runs/a"))[0] == 0
    path = tmp_path / "runs" / "a" / "run.json"
    content = json.loads(path.read_text())
    value = content[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content | {key: value}))
    status, out, err = command(evaluate)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "runs/a" in err
    assert len(err) < 500


def test_texts_that_are_cut_are_counted(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    rows = [("good", "a film"), ("bad", "a play " * 20), ("bad", "a film")]
    (tmp_path / "own.csv").write_text("label,text\n" + "".join(f"{label},{text}\n" for label, text in rows))
    own = ("--data", "own.csv", "--dev-data", "own.csv", "--max-length", 8)
    status, out, err = command(train, *quick(model), *own)
    assert (status, "\ntrain: cut to 8 tokens: 1\n" in out) == (0, True), err
    assert command(evaluate)[1].startswith("validation: cut to 8 tokens: 1\n")
    status, _, err = command(evaluate, "--test", "own.csv", "--text-columns", "text,label")
    assert (status, "--text-columns: text,label, should be 1, as in training" in err) == (2, True)


def test_an_evaluation_is_saved_though_nobody_reads_it_and_shown_though_it_cannot_be_saved(
    command, tmp_path, monkeypatch
):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "a"))[0] == 0
    for name, error, expected in (
        ("save_evaluation", PermissionError(errno.EACCES, "denied", "a"), (2, True, False)),
        ("print_evaluation", BrokenPipeError(), (141, False, True)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, name, Mock(side_effect=error))
            status, out, _ = command(evaluate, "a")
        assert (status, "area under the curve" in out, (tmp_path / "a" / "evaluation.json").exists()) == expected


def test_evaluate_names_the_classes_that_an_exit_never_predicts(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "a"))[0] == 0
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for k, bias in enumerate(([9.0, -9.0], [-9.0, 9.0])):
        tensors[f"heads.{k}.classifier.bias"] = torch.tensor(bias)
        tensors[f"heads.{k}.classifier.weight"].zero_()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    trust(tmp_path / "a")
    status, out, _ = command(evaluate, "a")
    evaluation = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    counts, names = evaluation["class_counts"], ("negative", "positive")
    assert counts[:2] == [[200, 0], [0, 200]]
    expected = ["the exit after layer 1 never predicts positive", "the exit after layer 2 never predicts negative"]
    expected += [f"the exit after layer 4 never predicts {names[c]}" for c in (0, 1) if counts[2][c] == 0]
    never = [warning for warning in evaluation["warnings"] if "never" in warning]
    assert [warning.split(":")[0] for warning in never] == expected
    assert all("--epochs" in warning for warning in never)
    assert (status, [f"warning: {warning}" in out for warning in evaluation["warnings"]].count(False)) == (0, 0)


def said(predictions: list[list[int]], labels: list[int]) -> list[str]:
    """evaluate.py's warnings of exits with these predictions; only who is likeliest counts."""
    logits = torch.nn.functional.one_hot(torch.tensor(predictions), 3).float()
    exits = Exits(tuple(range(1, len(predictions) + 1)), 4, "sweet")
    validation = Validation(logits, None, torch.tensor(labels), torch.arange(len(labels)), "accuracy", exits)
    return evaluate.warnings_of(validation, ["a", "b", "c"])


def test_evaluate_warns_of_level_exits_and_of_exits_that_disagree():
    labels = [0, 1, 2, 0, 1] * 30
    wrong = [(label + 1) % 3 for label in labels]
    assert said([wrong[:30] + labels[30:], labels], labels) == []
    (level,) = said([wrong[:1] + labels[1:], labels], labels)
    assert "level" in level
    assert "--method branch" in level
    (disagrees,) = said([wrong[:60] + labels[60:], labels], labels)
    assert "after layer 1 agrees with full depth on 60% of texts" in disagrees
    assert said([labels], labels) == []  # one exit is never level
    assert "2 validation rows of 2 classes" in said([labels[:2]] * 2, labels[:2])[0]
    assert "30 validation rows of 1 classes" in said([[1] * 30] * 2, [1] * 30)[0]


def test_where_full_depth_has_learnt_nothing_no_higher_rate_is_advised():
    labels = [0, 1, 2] * 20
    stuck, learnt = said([labels, [1] * 60], labels), said([[1] * 60, labels], labels)
    assert any("2 never predicts a, c: train at a lower --lr, with another --seed" in line for line in stuck)
    assert not any("higher --lr" in line for line in stuck)
    assert any("1 never predicts a, c: train longer (--epochs) or at a higher --lr" in line for line in learnt)


def test_evaluation_does_not_depend_on_the_order_of_its_rows(command, tmp_path):
    """The same training twice, validated on the same rows in another order: sorted by label, and alternating."""
    model = write_model(tmp_path / "tiny", "bert")
    words = "film bad good great dull not superb awful".split()
    texts = [f"the {words[n % 8]} {words[n // 8 % 8]} {words[n // 64]}" for n in range(120)]
    rows = [("ab"[(n * 7 // 3) % 2], text) for n, text in enumerate(texts)]
    in_turn = [row for pair in zip(*([r for r in rows if r[0] == c] for c in "ab"), strict=False) for row in pair]
    for name, content in {"train": rows, "sorted": sorted(in_turn), "turns": in_turn}.items():
        (tmp_path / f"{name}.csv").write_text("label,text\n" + "".join(f"{label},{text}\n" for label, text in content))
    found = []
    for name in ("sorted", "turns"):
        own = ("--data", "train.csv", "--dev-data", f"{name}.csv", "--method", "sweet")
        assert command(train, *quick(model, "--out", name), *own)[0] == 0
        assert command(evaluate, name)[0] == 0
        found.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    first, second = found
    for key in ("scores", "speedup_ratios", "temperatures", "exit_scores", "area"):
        assert first[key] == pytest.approx(second[key], rel=1e-4), key
    for key in ("ece", "nll"):
        assert first[key]["after"] == pytest.approx(second[key]["after"], rel=1e-3), key
    assert first["operating_point"]["threshold"] == pytest.approx(second["operating_point"]["threshold"], rel=1e-4)


def test_a_trunks_answers_are_told_no_certainty_that_they_do_not_have(command, tmp_path):
    """Without labels the last exit is not scaled by its own answers: here, and in what reads the evaluation."""
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "a", "--method", "mm", "--exit-layers", "4"))[0] == 0
    words = "film bad good great dull not superb awful".split()
    texts = [f"the {words[n % 8]} {words[n // 8 % 8]} {words[n // 64]}" for n in range(200)]
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(texts) + "\n")
    options = ("--data", "texts.csv", "--targets", "trunk", "--exit-layers", "1,2,4", "--max-length", 32)
    assert command(train, "--trunk", "a", *options, "--out", "b")[0] == 0
    assert command(evaluate, "b")[0] == 0
    evaluation = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert evaluation["metric"] == "agreement"
    assert evaluation["operating_point"]["wish"] == {"max_change": 3.0, "sure": 90.0}
    assert evaluation["operating_point"]["certified_rows"] == 30  # of forty
    assert evaluation["temperatures"][-1] == 1
    assert all(temperature > 0.05 for temperature in evaluation["temperatures"])
    assert evaluation["nll"]["after"][-1] == evaluation["nll"]["before"][-1]
    sure = [answer.confidence for answer in EarlyExitClassifier(tmp_path / "b", 1.0)(texts[:20])]
    assert sure == pytest.approx([answer.confidence for answer in EarlyExitClassifier(tmp_path / "a", 1.0)(texts[:20])])


@pytest.mark.parametrize("fails", [OSError("no space"), RuntimeError("no font")])
def test_a_figure_that_cannot_be_drawn_costs_no_table(command, tmp_path, monkeypatch, fails):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--out", "a"))[0] == 0

    def savefig(*_, **__):
        raise fails

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    status, out, err = command(evaluate, "a")
    assert (status, "Traceback" in err) == (0, False)
    assert "operating point: threshold" in out
    assert out.splitlines()[-1].startswith("a/curve.png: not drawn")
    assert str(fails) in out.splitlines()[-1]
    assert not (tmp_path / "a" / "curve.png").exists()
    assert (tmp_path / "a" / "evaluation.json").exists()


def test_evaluation_reads_the_data_dir_of_training_from_anywhere_or_the_given_one(command, tmp_path, monkeypatch):
    model = write_model(tmp_path / "tiny", "bert")
    (tmp_path / "one" / "RTE").mkdir(parents=True)
    rows = "".join(f"{n}\tthe film\tnot bad\tentailment\n" for n in range(3))
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "one" / "RTE" / file).write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    assert command(train, *quick(model, "--out", "a", "--task", "rte", "--data-dir", "one"))[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command(evaluate, "../a")[0] == 0
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["examples"] == 3
    (tmp_path / "one").rename(tmp_path / "two")
    assert command(evaluate, "../a", "--data-dir", "../two")[0] == 0


def test_a_model_of_multi_model_does_not_depend_on_the_others(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    last = []
    for name, layers in (("three", "1,2,4"), ("one", "4")):
        assert command(train, *quick(model, "--out", name, "--method", "mm", "--exit-layers", layers))[0] == 0
        last.append([row[-1] for row in json.loads((tmp_path / name / "run.json").read_text())["losses"]])
    assert last[0] == last[1]


def test_the_packages_names_and_shapes_are_as_it_says(tmp_path, model_type):
    block = textwrap.dedent("".join(re.findall(r"^    .*\n", minisweet.__doc__, re.MULTILINE)))
    write_model(tmp_path / "tiny", model_type, num_hidden_layers=6)
    input_ids, attention_mask, token_type_ids = random_batch()
    names = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids, "k": 3}
    names |= {name: getattr(minisweet, name) for name in minisweet.__all__}
    exec(block.replace("weights/minilm-l6", str(tmp_path / "tiny")), names)
    assert [tuple(hidden.shape) for hidden in names["hidden"]] == [(4, 11, 16)] * 7
    assert names["logits"].shape == (4, 4, 2)


def test_a_picture_replaces_no_file_of_another_kind(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model), "--out", "run")[0] == 0
    assert command(evaluate, "run", "--thresholds", 2)[0] == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    for option, module, path in (
        ("--plot", evaluate, "run/model.safetensors"),
        ("--plot", evaluate, "."),
        ("--html", explain, "run/run.json"),
        ("--html", explain, "."),
    ):
        status, _, err = command(module, "run", option, path)
        assert (status, err.count("\n"), option in err) == (2, 1, True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    for module, given, idle in (
        (evaluate, ("run", "--plot", "new.png", "--calibration", "none"), "--calibration: none needs an evaluation"),
        (evaluate, ("run", "--plot", "new.png", "--live"), "--live: needs an evaluation"),
        (evaluate, ("run", "--live-batch-size", 3), "--live-batch-size: 3 needs --live"),
        (explain, ("run", "a text", "--data", "dev.csv"), "--data: dev.csv needs --html"),
        (explain, ("run", "--html", "new.html", "--threshold", 0.7), "--threshold: 0.7 needs TEXT"),
    ):
        status, _, err = command(module, *given)
        assert (status, err.count("\n"), idle in err) == (2, 1, True), err
    assert not list(tmp_path.glob("new.*"))
    status, _, err = command(train, "--trunk", "run", "--model", model)
    assert (status, "--model: " in err) == (2, True)
    status, _, err = command(train, *quick(model), "--out", "n" * 240)
    assert (status, "--out: " in err) == (2, True)


@pytest.mark.parametrize(
    ("module", "options", "option"),
    [
        (train, ("--data", "sealed/a.csv"), "--data"),
        (train, ("--task", "rte", "--data-dir", "sealed"), "--data-dir"),
        (train, ("--trunk", "sealed/run"), "--trunk"),
        (train, ("--out", "sealed/run"), "--out"),
        (evaluate, ("sealed/run",), "RUN"),
        (predict, ("run", "sealed/a.csv"), "FILE"),
    ],
)
def test_a_folder_that_may_not_be_searched_names_the_option(command, monkeypatch, module, options, option):
    real = os.stat

    def ask(path, *args, **more):  # tests may run as root, for whom there are no permissions
        if str(path).startswith("sealed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "stat", ask)
    path = next(word for word in options if word.startswith("sealed"))
    status, _, err = command(module, *options)
    assert (status, err.count("\n")) == (2, 1)
    assert f"argument {option}: {path!r} cannot be reached (Permission denied)" in err


@pytest.mark.parametrize("option", ["--data", "--out", "--trunk", "--data-dir"])
def test_no_path_is_empty(command, option):
    status, _, err = command(train, option, "")
    assert (status, err.count("\n"), f"argument {option}: '' is no path" in err) == (2, 1, True)
