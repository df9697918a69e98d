"""Branches on a frozen trunk by the commands: the trunk is a plain model to the bit, and stays it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from minisweet import EarlyExitClassifier
from minisweet.adaptive import ExitRule
from minisweet.branches import METHODS, add_exits, slice_trunk
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel, build_alone
from minisweet.live import early_exit
from minisweet.runs.folders import load_run, load_trunk
from tests.conftest import quick, random_batch, write_model


def short(*arguments) -> list:
    """train.py's arguments for a short training."""
    return ["--train-size", 32, "--epochs", 1, "--max-length", 32, "--exit-layers", "1,2,4", "--seed", 3, *arguments]


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
def test_a_trunk_is_a_plain_model_to_the_bit_wherever_it_comes_from(command, model_dir, tmp_path, strategy):
    same = ["--lr", "1e-3", "--exit-strategy", strategy]
    new = ["--model", model_dir, *same]
    for out, arguments in {
        "mm": [*new, "--method", "mm"],
        "one": [*new, "--method", "sweet", "--exit-layers", 4],
        "branch": [*new, "--method", "branch"],
        "on-mm": ["--trunk", "mm", *same],
        "on-one": ["--trunk", "one", *same],
        "on-branch": ["--trunk", "branch", *same],
    }.items():
        if out == "on-mm":  # a training was killed while it replaced the trunk
            killed = tmp_path / ".mm.0123456789abcdef.partial"
            killed.mkdir()
            (tmp_path / "mm").rename(killed / "old")
        status, _, err = command(train, *short(*arguments, "--out", out))
        assert status == 0, err
    assert not killed.exists()
    weights = {path.parent.name: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    ours, mm = weights["branch"], weights["mm"]
    trunk = {name for name in ours if name.startswith(("encoder.", "heads.2."))}
    for name in trunk:
        assert torch.equal(ours[name], mm[f"2.{name.replace('heads.2.', 'heads.0.')}"]), name
        assert torch.equal(ours[name], weights["one"][name.replace("heads.2.", "heads.0.")]), name
    theirs = {name for name in mm if name.startswith("2.") and ".lte." not in name}
    assert len(trunk) == len(theirs)
    assert ("heads.0.lte.weight" in ours) is (strategy == "lte")
    for name in ("on-mm", "on-one", "on-branch"):
        assert weights[name].keys() == ours.keys()
        assert all(torch.equal(weights[name][key], ours[key]) for key in ours), name
    losses = {path.parent.name: json.loads(path.read_text())["losses"] for path in tmp_path.glob("*/run.json")}
    assert [row[2] for row in losses["branch"]] == [row[2] for row in losses["mm"]]
    assert losses["on-mm"] == losses["on-one"] == [row[:2] for row in losses["branch"]]
    assert losses["branch"][0][:2] != losses["branch"][1][:2]

    batch, (model, record), plain = random_batch(1), load_run(tmp_path / "branch"), load_run(tmp_path / "mm")[0][-1]
    assert (record.method, record.exit_strategy, record.depth) == ("branch", strategy, 4)
    rule = ExitRule(2) if strategy == "confidence" else ExitRule(2, ranges=torch.tensor([[0.0, 1.0]] * 3))
    with torch.no_grad():
        expected = plain(*batch)[0]
        assert torch.equal(model(*batch)[-1], expected)
        assert torch.equal(model.keep_exits((4,))(*batch)[0], expected)
        assert torch.equal(model.keep_exits((2, 4))(*batch)[-1], expected)
        ours, alone = (early_exit(m, *batch, 1.0, r) for m, r in ((model, rule), (plain, ExitRule(2))))
        assert torch.equal(ours.logits, alone.logits)
        assert not any(torch.equal(logits, expected) for logits in model(*batch)[:-1])


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
def test_ee_sweet_and_slices_start_from_a_trunk_to_the_bit(model_dir, strategy):
    def new_trunk() -> MultiExitModel:
        torch.manual_seed(5)
        trunk = build_alone(model_dir, 4, 2, strategy).eval()
        torch.manual_seed(6)
        return trunk

    batch = random_batch()
    with torch.no_grad():
        expected = new_trunk()(*batch)[0]
        for method in ("ee", "sweet"):
            model = add_exits(new_trunk(), (1, 2, 4), method, strategy)
            assert (model.method, model.exit_layers) == (method, (1, 2, 4))
            assert torch.equal(model(*batch)[-1], expected)
            assert all((head.lte is None) is (strategy == "confidence") for head in model.heads)
            assert torch.equal(model.heads[0].pooler.weight, model.heads[2].pooler.weight)
            assert not torch.equal(model.heads[0].classifier.weight, model.heads[2].classifier.weight)
        trunk = new_trunk()
        models = slice_trunk(trunk, (1, 2, 4), strategy)
        assert (models.exit_layers, models[-1]) == ((1, 2, 4), trunk)
        assert torch.equal(models(*batch)[-1], expected)
        for n, part in zip((1, 2), models, strict=False):
            assert len(part.encoder.layers) == part.encoder.config.num_hidden_layers == n
            for ours, theirs in zip(part.encoder.parameters(), trunk.encoder.parameters(), strict=False):
                assert torch.equal(ours, theirs)
                assert ours.data_ptr() != theirs.data_ptr()
    for make in (add_exits, slice_trunk):
        with pytest.raises(ValueError, match="the trunk has its exit after 4"):
            make(new_trunk(), (1, 3))


@pytest.mark.parametrize(("method", "targets"), [("ee", "labels"), ("ee", "trunk"), ("sweet", "half"), ("mm", "trunk")])
def test_every_method_trains_from_a_trunk(command, tmp_path, method, targets):
    model = write_model(tmp_path / "tiny", "bert")
    trunk = ["--model", model, "--method", "sweet", "--exit-layers", 4, "--lr", "1e-3", "--out", "trunk"]
    for arguments in (trunk, ["--trunk", "trunk", "--method", method, "--targets", targets, "--out", "grown"]):
        status, _, err = command(train, *short(*arguments))
        assert status == 0, err
    (grown, record), (plain, _) = load_run(tmp_path / "grown"), load_run(tmp_path / "trunk")
    assert (record.method, len(record.losses[0])) == (method, 2 if method == "mm" else 3)
    same = torch.equal(grown(*random_batch())[-1], plain(*random_batch())[-1])
    assert same is (method == "mm")  # whose last model is the trunk; the others go on training it
    assert command(evaluate, "grown")[0] == 0


@pytest.mark.parametrize("method", ["branch", "mm"])
def test_nothing_is_left_to_train_where_a_trunk_has_the_only_exit(command, tmp_path, method):
    write_model(tmp_path / "tiny", "bert")
    assert command(train, *short("--model", "tiny", "--lr", "1e-3", "--out", "trunk", "--exit-layers", 4))[0] == 0
    arguments = ["--trunk", "trunk", "--method", method, "--exit-layers", 4]
    status, _, err = command(train, *short(*arguments))
    assert status == 2
    assert "--exit-layers: 4 is one exit alone, which --trunk has" in err


@pytest.mark.parametrize("method", METHODS)
def test_with_one_exit_alone_every_method_is_the_plain_model(command, tmp_path, method):
    model = write_model(tmp_path / "tiny", "bert")
    arguments = ["--model", model, "--lr", "1e-3", "--exit-layers", 4]
    for name in ("sweet", method):
        assert command(train, *short(*arguments, "--method", name, "--out", name, "--overwrite"))[0] == 0
    assert command(evaluate, method)[0] == 0
    with torch.no_grad():
        ours, plain = (load_run(tmp_path / name)[0](*random_batch()) for name in (method, "sweet"))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("method", METHODS)
def test_one_exit_alone_that_would_learn_to_exit(command, tmp_path, method):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *short("--model", model, "--method", method, "--exit-strategy", "lte", "--out", "a"))[0] == 0
    for options in (["--use-exits", 4], ["--use-exits", 4, "--speed", 1], ["--use-exits", 4, "--max-change", 5]):
        status, out, err = command(evaluate, "a", *options)
        assert (status, "not drawn" in out) == (0, False), err
        assert [answer.exit_layer for answer in EarlyExitClassifier("a", max_loss=1)(["a film", "bad"])] == [4, 4]


def test_the_branches_rate_is_the_factor_times_the_trunks(command, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self)
    )
    model = write_model(tmp_path / "tiny", "bert")
    for factor in ([], ["--branch-lr-factor", 3]):
        arguments = ["--model", model, "--method", "branch", "--lr", "1e-4", "--overwrite", "--out", "a", *factor]
        assert command(train, *short(*arguments))[0] == 0
    trunk, twice, thrice = ([rate, rate / 2] for rate in (1e-4, 2e-4, 3e-4))
    assert rates == pytest.approx([*trunk, *twice, *trunk, *thrice])


def test_targets_change_what_branches_learn_and_the_trunks_need_no_labels(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *short("--model", model, "--method", "mm", "--out", "mm", "--lr", "1e-2"))[0] == 0
    assert command(train, *short("--trunk", "mm", "--out", "labels"))[0] == 0
    for targets in ("trunk", "half"):
        assert command(train, *short("--trunk", "mm", "--targets", targets, "--out", targets))[0] == 0
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("labels", "trunk", "half")}
    for name, tensor in weights["labels"].items():
        same = [torch.equal(weights[targets][name], tensor) for targets in ("trunk", "half")]
        assert same == [name.startswith(("encoder.", "heads.2."))] * 2, name
    assert json.loads((tmp_path / "half" / "run.json").read_text())["arguments"]["targets"] == "half"
    rows = "".join(f"the film {word}\n" for word in ("good", "bad", "great", "dull", "superb", "awful") * 4)
    (tmp_path / "texts.csv").write_text("text\n" + rows)
    arguments = ["--trunk", "mm", "--targets", "trunk", "--data", "texts.csv", "--out", "unlabelled"]
    status, _, err = command(train, *short(*arguments))
    assert status == 0, err
    assert command(evaluate, "unlabelled")[0] == 0
    result = json.loads((tmp_path / "unlabelled" / "evaluation.json").read_text())
    assert (result["metric"], result["exit_scores"][-1]) == ("agreement", 100)


def test_a_trunk_in_a_folder_that_is_called_like_a_preset(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *short("--model", model, "--exit-layers", 4, "--out", "bert-base"))[0] == 0
    status, out, err = command(train, *short("--trunk", "bert-base", "--out", "a"))
    assert (status, "of 4, seed" in out) == (0, True), err
    assert load_run(Path("a"))[1].model == "./bert-base"


def test_a_classifier_of_transformers_keeps_its_answers_when_branches_are_grown_on_it(command, model_dir, model_type):
    transformers = pytest.importorskip("transformers")
    name = {"bert": "Bert", "deberta": "Deberta"}[model_type]
    config = getattr(transformers, f"{name}Config").from_pretrained(model_dir)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    for parameter in theirs.parameters():  # as drawn by default, position terms would hardly show
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(model_dir)  # beside the vocabulary
    input_ids, mask, token_types = random_batch()
    types = {"token_type_ids": token_types} if model_type == "bert" else {}
    with torch.no_grad():
        expected = theirs(input_ids=input_ids, attention_mask=mask, **types).logits
    status, _, err = command(train, *short("--trunk", model_dir, "--out", "a", "--lr", "1e-2"))
    assert status == 0, err
    with torch.no_grad():
        trunk = load_trunk(model_dir)[0](input_ids, mask, token_types)
        after = load_run(Path("a"))[0](input_ids, mask, token_types)
    torch.testing.assert_close(trunk[0], expected, atol=1e-5, rtol=0)
    assert torch.equal(after[-1], trunk[0])
    assert (after[:-1] != after[-1]).any()


@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
def test_exits_that_are_not_used_are_neither_run_nor_counted(command, tmp_path, monkeypatch, method):
    model = write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(model, "--method", method, "--out", "a"))[0] == 0
    ran = set()

    def watched(run):
        model, record = load_run(run)
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, n=name: ran.add(n))
        return model, record

    monkeypatch.setattr(evaluate, "load_run", watched)
    status, out, err = command(evaluate, "a", "--use-exits", "2,4", "--thresholds", 5, "--live", "--calibration", "dev")
    assert status == 0, err
    unused = {"sweet": ("heads.0.",), "mm": ("0.",), "branch": ("heads.0.", "branches.0.")}[method]
    used = {"sweet": "heads.1.", "mm": "1.", "branch": "branches.1."}[method]
    assert not any(name.startswith(unused) for name in ran)
    assert any(name.startswith(used) for name in ran)
    result = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert result["exit_layers"] == [2, 4]
    assert np.shape(result["exit_counts"]) == (5, 2)
    below = {"sweet": [2, 4], "mm": [2, 6], "branch": [2, 4 + 1 / 6]}[method]
    for n, counts in enumerate(result["exit_counts"]):
        costs = [2, 4] if method == "branch" and n == 4 else below
        assert result["speedup_ratios"][n] == pytest.approx(np.dot(counts, costs) / 4 / 200)
    assert [row["layer_share"] for row in result["live"]] == pytest.approx(result["speedup_ratios"])
    assert "in 0 of 1000 decisions" in out
    for wrong in ("1,2", "3,4", "4,2", "x"):
        status, _, err = command(evaluate, "a", "--use-exits", wrong)
        assert (status, err.count("\n"), "--use-exits" in err) == (2, 1, True)
