"""The training loop against plain loops, what each method trains, and what run.json tells of it."""

import copy
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import evaluate
import train
from minisweet import MultiExitModel, load_encoder, methods
from minisweet.base.files import read_json
from minisweet.branches import BranchModel
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.exits import EXIT_STRATEGIES
from minisweet.methods import METHODS
from minisweet.runs.folders import load_run, load_trunk, read_record
from tests.conftest import WORDS, in_folder, model_of, quick, random_batch, run, write_model
from tests.test_checkpoint import write_classifier
from tests.test_readme import EXERCISES, blocks_of


def fine_tune(
    model: MultiExitModel, examples: TokenizedExamples, rate: float, size=4, seed=0, epochs=1, **more
) -> list:
    """Train a model in place, with its table cut to the rows in use; each step's losses."""
    with train.used_rows(model, examples) as row_of:
        batches = list(chain.from_iterable(examples.shuffled(size, seed, epoch) for epoch in range(epochs)))
        assert row_of[torch.cat([batch.input_ids.flatten() for batch in batches])].unique().tolist() == [
            *range(len(model.encoder.word_embeddings.weight))
        ]
        batches = [batch._replace(input_ids=row_of[batch.input_ids]) for batch in batches]
        return train.fine_tune(model, batches, len(batches), rate, seed, **more)


def toy_examples(folder: Path, rows: range | list[int], max_length: int = 32) -> TokenizedExamples:
    tokenizer = load_tokenizer(folder, 60, max_length)
    return TokenizedExamples(tokenizer, load_examples("toy", "train", Path()).take(rows))


@pytest.mark.parametrize("method", ["sweet", "ee", "branch"])
def test_training_is_adamw_on_the_clipped_gradient_of_the_summed_loss(tmp_path, model_type, method):
    """Against a loop that holds the whole graph and table, clips by hand and uses another implementation of AdamW."""
    folder = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    examples = toy_examples(folder, range(24), 16)
    ours = model_of(folder, method)
    for head in ours.heads:
        torch.nn.init.normal_(head.classifier.weight)  # so that clipping is needed
    plain = copy.deepcopy(ours)
    history = fine_tune(ours, examples, 1e-2, size=8, seed=5, epochs=2)

    groups = [list(plain.parameters())]
    if method == "branch":
        names = [("branches.0.", "heads.0."), ("branches.1.", "heads.1.")]
        groups = [[p for name, p in plain.named_parameters() if name.startswith(own)] for own in names]
    optimizer = torch.optim.AdamW(sum(groups, []), betas=(0.9, 0.999), weight_decay=0.0, foreach=False)
    step, norms = 0, []
    for epoch in range(2):
        for batch in examples.shuffled(8, 5, epoch):
            losses = [torch.nn.functional.cross_entropy(logits, batch.targets) for logits in plain(*batch.inputs)]
            losses = losses[:2] if method == "branch" else losses
            assert history[step] == pytest.approx([loss.item() for loss in losses], abs=1e-3)
            optimizer.zero_grad()
            sum(losses).backward()
            for group in groups:
                norms.append(torch.sqrt(sum(p.grad.square().sum() for p in group if p.grad is not None)))
                for parameter in group:
                    if parameter.grad is not None:
                        parameter.grad /= max(1.0, norms[-1])
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)
            optimizer.step()
            step += 1
    assert step == len(history) == 6
    assert max(norms) > 1.2
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_where_branches_are_trained_the_trunk_runs_without_dropout_and_as_far_as_it_must(tmp_path, model_type):
    folder = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.3)
    model, ran = model_of(folder, "branch", (1, 3, 4)).eval(), []
    model.encoder.layers[2].register_forward_hook(lambda *_: ran.append(1))
    assert np.shape(fine_tune(model, toy_examples(folder, range(20)), 1e-2)) == (5, 2)
    assert not ran  # the trunk's layer 3, which no branch reads
    new = BranchModel(copy.deepcopy(model.encoder).train(), (1, 4), 2)
    assert (new.encoder.training, new.branches[0].training) == (False, True)
    one, other = model(*random_batch()), model(*random_batch())
    assert torch.equal(one[-1], other[-1])
    assert (one[:-1] != other[:-1]).flatten(1).any(1).all()


@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_mixed_precision_gradients_are_those_of_float32(tmp_path, monkeypatch, method):
    """float16 gradients are unscaled before they are clipped."""
    folder, norms, clip = write_model(tmp_path / "tiny", "bert"), {}, train.clip_grad_norm_
    for precision in (None, torch.bfloat16, torch.float16):
        seen = norms.setdefault(precision, [])
        monkeypatch.setattr(train, "clip_grad_norm_", lambda group, limit, seen=seen: seen.append(clip(group, limit)))
        model = model_of(folder, method, (1, 4)).eval()
        fine_tune(model, toy_examples(folder, range(16), 16), 1e-3, size=16, precision=precision)
    assert norms[torch.float16][0].item() == pytest.approx(norms[None][0].item(), rel=0.05)
    assert norms[torch.bfloat16][0].item() == pytest.approx(norms[None][0].item(), rel=0.1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.booleans())
def test_balanced_classes_weigh_the_same_and_all_rows_together_as_much_as_before(labels, are_probabilities):
    N, classes, rows = len(labels), len({*labels}), np.eye(4)[labels]
    rows = rows * 0.6 + 0.1 if are_probabilities else rows  # of a trunk, whose answers are the classes
    weighted = train.balanced(rows if are_probabilities else np.array(labels), 4)
    weights = weighted.sum(1)
    np.testing.assert_allclose(weighted, rows * weights[:, None], rtol=1e-5)
    for label in {*labels}:
        its = weights[np.array(labels) == label]
        np.testing.assert_allclose(its, N / (classes * len(its)), rtol=1e-5)


def test_an_error_leaves_the_embedding_whole(model_dir):
    model = MultiExitModel(load_encoder(model_dir), (4,), 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError), train.used_rows(model, toy_examples(model_dir, range(8))):
        raise FloatingPointError
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# What follows runs train.py.


def weights_of(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run, "model.safetensors"))


@pytest.fixture
def trained(command):
    """Run train.py, which must go well; gives what it prints."""

    def run_and_read(*arguments) -> str:
        status, out, err = command(train, *arguments)
        assert status == 0, err
        return out

    return run_and_read


@pytest.mark.parametrize("method", METHODS)
def test_a_run_tells_what_made_it(trained, model_dir, method):
    layers = [4] if method == "plain" else [1, 2, 4]
    options = ["--method", method, "--exit-layers", ",".join(map(str, layers)), "--seed", 3]
    assert "lr 0.0002" in trained(*quick(model_dir, *options))
    record = read_json(Path(f"runs/tiny-{method}-toy-seed3/run.json"))
    assert len(record["subset"]) == 48 == len(set(record["subset"]))
    assert (np.shape(record["losses"]), record["exit_layers"]) == ((6, len(layers)), layers)
    stages = {"mm": ["layers 1", "layers 2", "layers 4"], "branch": ["trunk", "branches"], "plain": ["trunk"]}
    assert list(record["stages"]) == stages.get(method, [method])
    assert record["train_tokens"] == sorted({*toy_examples(model_dir, record["subset"]).keys().tolist()})
    assert {"torch", "tokenizers", "python"} <= set(record["versions"])


def test_a_row_adds_a_method(trained, command, tmp_path, monkeypatch):
    """EE, whose last loss counts twice, as in the exercises. The other exits get another share of the gradient."""
    (code,) = [block for _, block in blocks_of(EXERCISES) if "LastCountsTwice" in block]
    monkeypatch.setitem(METHODS, "twice", None)  # so that it goes afterwards
    exec(code, dict(vars(methods)))
    model = write_model(tmp_path / "tiny", "bert", hidden_dropout_prob=0.0)
    for method in ("ee", "twice"):
        trained(*quick(model, "--method", method, "--out", method))
        assert command(evaluate, method)[0] == 0
    (ours, record), ee = load_run(Path("twice")), read_json(Path("ee/run.json"))
    assert (record.method, type(ours).__name__) == ("twice", "LastCountsTwice")
    assert np.allclose(record.losses[0], ee["losses"][0])
    assert not np.allclose(record.losses[1], ee["losses"][1], atol=1e-4)


def test_a_training_that_diverges_leaves_its_step_but_no_weights(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    options = quick(model, "--lr", "1e30", "--amp", "off", "--out", "a")
    status, _, err = command(train, *options, "--save-every", "1e-9")
    message = "train.py: error: --lr: at 1e+30 the loss became infinite or NaN at step 2; try a lower one\n"
    assert (status, err.splitlines(True)[-1]) == (2, message)
    assert [path.name for path in Path().glob("*a*/*")] == ["run.json"]  # no weights, and no checkpoint
    assert (read_record(Path("a")).diverged, read_record(Path("a")).lr) == (2, 1e30)
    at_the_end = command(train, *options, "--train-size", 1, "--epochs", 1, "--lr", "1e39", "--overwrite")
    assert (at_the_end[0], "NaN at step 1; try a lower one" in at_the_end[2]) == (2, True)
    assert command(train, *quick(model, "--out", "a", "--overwrite"))[0] == 0
    assert command(train, *options, "--overwrite")[0] == 2
    assert load_run(Path("a"))[1].diverged is None  # a run with weights stays


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """For each method a run with exits 0 and 4, of the model in the folder `tiny`."""
    folder = tmp_path_factory.mktemp("plain")
    model = write_model(folder / "tiny", "bert")
    with in_folder(folder):
        for method in METHODS:
            assert run(train, *quick(model, "--exit-layers", "0,4", "--method", method, "--out", method)) == 0
    return folder


def test_with_exits_0_and_L_all_methods_are_one(plain):
    weights = {method: weights_of(plain / method) for method in METHODS}
    weights["mm"] = {name.removeprefix("models.0."): tensor for name, tensor in weights["mm"].items()}
    for method in METHODS:
        assert weights[method].keys() == weights["sweet"].keys()
        assert all(torch.equal(weights[method][name], tensor) for name, tensor in weights["sweet"].items())
        record = read_json(plain / method / "run.json")
        assert (record["exit_layers"], np.shape(record["losses"])) == ([0, 4], (6, 1))
        assert list(record["stages"])[-1] == "exit 0"


@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
def test_exit_0_beside_others_changes_none_of_them(trained, plain, tmp_path, method):
    """It is the same bag of words with the other exits and without, and they are the same with it and without."""
    for layers in ("0,2,4", "2,4"):
        trained(*quick(plain / "tiny", "--exit-layers", layers, "--method", method, "--out", f"run-{layers}"))
    both, without, alone = map(weights_of, ("run-0,2,4", "run-2,4", plain / method))
    ngrams = {name for name in both if name.startswith("ngrams.")}
    assert ngrams
    assert both.keys() - ngrams == without.keys()
    assert all(torch.equal(both[name], without[name]) for name in without)
    assert all(torch.equal(both[name], alone[name]) for name in ngrams)


@pytest.mark.parametrize("method", METHODS)
def test_a_trunk_gets_exit_0_and_stays_as_it_is(trained, plain, method):
    trunk = plain / "sweet"  # which has exit 0 itself; another one is fitted
    options = ["--train-size", 30, "--max-length", 32, "--method", method, "--seed", 1, "--out", "run"]
    options += [] if method == "plain" else ["--exit-layers", "0,4"]  # which is its default
    assert "no layer is trained: the trunk stays as it is" in trained("--trunk", trunk, *options)
    before, after = map(weights_of, (trunk, "run"))
    after = {name.removeprefix("models.0."): tensor for name, tensor in after.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved
    assert all(name.startswith("ngrams.") for name in moved)
    record = read_json(Path("run/run.json"))
    assert (record["losses"], list(record["stages"]), record["exit_layers"]) == ([], ["exit 0"], [0, 4])
    assert set(read_json(trunk / "run.json")["train_tokens"]) < set(record["train_tokens"])


SHORT = "--train-size 32 --epochs 1 --max-length 32 --exit-layers 1,2,4 --seed 3".split()


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
def test_a_trunk_is_a_plain_model_to_the_bit_wherever_it_comes_from(trained, model_dir, tmp_path, strategy):
    same = ["--lr", "1e-3", "--exit-strategy", strategy]
    new = ["--model", model_dir, *same]
    for out, arguments in {
        "mm": [*new, "--method", "mm"],
        "one": [*new, "--method", "sweet", "--exit-layers", 4],
        "branch": [*new, "--method", "branch"],
        "on-mm": ["--trunk", "mm", "--method", "branch", *same],
        "on-one": ["--trunk", "one", "--method", "branch", *same],
        "on-branch": ["--trunk", "branch", "--method", "branch", *same],
    }.items():
        trained(*SHORT, *arguments, "--out", out)
    weights = {path.parent.name: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    ours, mm = weights["branch"], weights["mm"]
    trunk = {name for name in ours if name.startswith(("encoder.", "heads.2."))}
    for name in trunk:
        assert torch.equal(ours[name], mm[f"models.2.{name.replace('heads.2.', 'heads.0.')}"]), name
        assert torch.equal(ours[name], weights["one"][name.replace("heads.2.", "heads.0.")]), name
    assert len(trunk) == len([name for name in mm if name.startswith("models.2.")])
    assert ("heads.0.lte.weight" in ours) is (strategy == "lte")
    for name in ("on-mm", "on-one", "on-branch"):
        assert weights[name].keys() == ours.keys()
        assert all(torch.equal(weights[name][key], ours[key]) for key in ours), name


@pytest.mark.parametrize("method", ["ee", "mm"])
def test_every_method_trains_from_a_trunk(trained, tmp_path, method):
    model = write_model(tmp_path / "tiny", "bert")
    trained(*SHORT, "--model", model, "--method", "sweet", "--exit-layers", 4, "--lr", "1e-3", "--out", "bert-base")
    grow = ["--trunk", "bert-base", "--method", method, "--targets", "trunk"]  # a folder that is called like a preset
    trained(*SHORT, *grow, "--out", "grown")
    (grown, record), (plain, _) = load_run(Path("grown")), load_run(Path("bert-base"))
    assert (record.method, len(record.losses[0]), record.model) == (method, 3 if method == "ee" else 2, "./bert-base")
    same = torch.equal(grown(*random_batch())[-1], plain(*random_batch())[-1])
    assert same is (method != "ee")  # which goes on training the trunk


@pytest.mark.parametrize(("targets", "is_balanced"), [("trunk", False), ("trunk", True), ("labels", True)])
def test_branches_and_exit_0_learn_the_trunks_probabilities_or_balanced_rows(
    trained, tmp_path, monkeypatch, targets, is_balanced
):
    """The trunk answers without dropout."""
    model, seen = write_model(tmp_path / "tiny", "bert", hidden_dropout_prob=0.3), []
    fit, loss = train.fit_ngrams, train.exit_loss
    monkeypatch.setattr(train, "exit_loss", lambda *given: seen.append(given[2]) or loss(*given))
    monkeypatch.setattr(train, "fit_ngrams", lambda *given: seen.append(given[2]) or fit(*given))
    trained(*SHORT, "--model", model, "--method", "plain", "--exit-layers", 4, "--lr", "1e-3", "--out", "one")
    seen.clear()
    options = ["--trunk", "one", "--method", "branch", "--targets", targets, "--batch-size", 32]
    options += ["--class-weights", "balanced"] * is_balanced
    trained(*SHORT, *options, "--exit-layers", "0,2,4", "--out", "a", "--amp", "off")
    trunk, record = load_run(Path("one"))
    batch = toy_examples(model, record.subset).batch(np.arange(32))
    with torch.no_grad():
        learnt = trunk(*batch.inputs)[0].softmax(-1) if targets == "trunk" else batch.targets
    expected = torch.from_numpy(train.balanced(learnt.numpy(), 2)) if is_balanced else learnt
    assert not (is_balanced and torch.equal(expected, learnt)), "the trunk should answer with both classes"
    branches, exit_0 = seen
    torch.testing.assert_close(exit_0, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(branches.sort(0).values, expected.sort(0).values, atol=1e-5, rtol=1e-5)


def test_a_trunk_from_elsewhere_and_text_with_no_labels_of_its_own(command, trained, tmp_path, caplog):
    write_classifier(tmp_path / "theirs")
    rows = "".join(f"{a} film {b},unknown\n" for a in WORDS[:8] for b in WORDS[:5])
    Path("texts.csv").write_text(f"text,label\n{rows}")
    options = ["--trunk", "theirs", "--data", "texts.csv", "--targets", "trunk", "--labels", "no,yes"]
    trained(*options, "--max-length", 32, "--out", "run", "--class-weights", "balanced")
    model, record = load_run(Path("run"))
    with torch.no_grad():
        assert torch.equal(model(*random_batch())[-1], load_trunk(Path("theirs"))[0](*random_batch())[0])
    assert (record.exit_layers, record.labels, record.metric) == ([0, 4], ["no", "yes"], "agreement")
    assert "should be one of no, yes; none of its labels is used" in caplog.text
    assert record.train_tokens  # its own are known
    assert not record.knows_all_texts
    assert command(evaluate, "run")[0] == 0
    result = read_json(Path("run/evaluation.json"))
    assert (result["metric"], result["exit_scores"][-1]) == ("agreement", 100)
