"""Run folders: whole or not at all, what is read is what was saved, and no value is taken that no command writes."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minisweet import load_encoder
from minisweet.base.safe import InputError, clear_leftovers, sha256, write_json
from minisweet.checkpoint import load_classifier
from minisweet.exits import build_multi_model
from minisweet.runs import folders as runs
from minisweet.runs.folders import (
    claim_output,
    load_run,
    load_trunk,
    method_name,
    read_diverged,
    read_evaluation,
    read_record,
    run_digest,
    run_name,
    save_run,
)
from minisweet.runs.records import Record
from tests.conftest import CONFIGS, exit_model, random_batch, write_model
from tests.test_checkpoint import save_classifier
from tests.test_safe import content, stopped_at

EXAMPLES = 60  # of the property test; raise it by hand
LAYERS = [1, 4]


def make_record(method: str = "sweet", **changes) -> dict:
    arguments = {"model": "tiny", "method": method, "task": "toy", "seed": 3, "exit_strategy": "confidence"}
    arguments |= {"lr": 1e-3, "epochs": 1, "batch_size": 16, "max_length": 32, "train_size": 48, "data_dir": "data"}
    record = {"arguments": arguments, "metric": "accuracy", "labels": ["negative", "positive"], "exit_layers": LAYERS}
    record |= {"depth": 4, "device": "none", "precision": "torch.float32", "versions": {"torch": "2"}, "seconds": 1.5}
    return record | {"finished": "now", "subset": [0, 2], "losses": [[0.7, 0.6], [0.5, 0.4]]} | changes


DEEP = json.loads('{"a":' * 450 + '"b"' + "}" * 450)

POINT = {"threshold": 0.5, "score": 50.0, "full_depth_score": 75.0, "speedup_ratio": 0.5}
POINT |= {"macro_f1": 48.5, "loss": 25.0, "loss_interval": [-9.5, 60.0], "speedup_interval": [0.3, 0.9]}
POINT |= {"reached": True, "wish": {"max_change": 3.0, "sure": 90.0}}
EVALUATION = {
    "task": "toy",
    "method": "sweet",
    "metric": "accuracy",
    "exit_strategy": "confidence",
    "exit_layers": LAYERS,
    "exit_scores": [50.0, 75.0],
    "thresholds": [0.5, 0.75, 1.0],
    "scores": [50.0, 50.0, 75.0],
    "speedup_ratios": [0.25, 0.6, 1.0],
    "exit_counts": [[4, 0], [2, 2], [0, 4]],
    "area": 60.0,
    "class_counts": [[1, 3], [2, 2]],
    "calibration": "crossfit",
    "temperatures": [1.0, 1.2],
    "examples": 4,
    "operating_point": POINT,
    "logits_digest": "0",
    "dev_digest": "1",
    "precision": "torch.float32",
}


def make_model(folder: Path, method: str = "sweet", num_labels: int = 2):
    if method == "mm":
        return build_multi_model(folder, LAYERS, num_labels).eval()
    return exit_model(load_encoder(folder), LAYERS, num_labels, method).eval()


def make_run(folder: Path, model_type: str = "bert", method: str = "sweet", **changes) -> Path:
    """A run with random weights, beside its model; its path."""
    model_folder = write_model(folder / "tiny", model_type)
    save_run(folder / "run", make_model(model_folder, method), model_folder, make_record(method, **changes), False)
    return folder / "run"


def evaluated(run: Path) -> Record:
    """Write an evaluation of the run; its record."""
    record = read_record(run)
    write_json(run / "evaluation.json", EVALUATION | {"run_digest": run_digest(record)})
    return record


def trust(run: Path) -> None:
    """Take what stands there for what was saved."""
    edit(run / "run.json", digests={path.name: sha256(path) for path in run.iterdir() if path.name != "run.json"})


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("method", ["sweet", "ee", "mm", "branch"])
def test_what_is_loaded_is_what_was_saved(tmp_path, model_type, method):
    run = make_run(tmp_path, model_type, method)
    torch.manual_seed(0)
    model = make_model(tmp_path / "tiny", method)
    save_run(run, model, tmp_path / "tiny", make_record(method), True)
    loaded, record = load_run(run)
    assert not loaded.training
    assert loaded.exit_layers == (1, 4)
    torch.testing.assert_close(loaded(*random_batch()), model(*random_batch()), rtol=0, atol=0)
    names = ("method", "task", "model", "seed", "lr", "exit_strategy", "num_labels", "depth", "vocab_size")
    assert [getattr(record, name) for name in names] == [method, "toy", "tiny", 3, 1e-3, "confidence", 2, 4, 60]
    if method in ("mm", "branch"):
        trunk, _ = load_trunk(run)
        torch.testing.assert_close(trunk(*random_batch())[0], model(*random_batch())[-1], rtol=0, atol=1e-6)
    else:
        with pytest.raises(InputError, match="has exits after layers 1,4"):
            load_trunk(run)


def test_no_other_library_takes_a_run_for_its_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path)
    assert json.loads((run / "config.json").read_text())["model_type"] == "minisweet"
    with pytest.raises(ValueError, match="minisweet"):
        transformers.AutoModel.from_pretrained(run)
    save_run(tmp_path / "again", make_model(run.parent / "tiny"), run, make_record(), False)  # from a run's own folder
    load_run(tmp_path / "again")


def test_a_run_without_digests_is_refused(tmp_path):
    run = make_run(tmp_path)
    edit(run / "run.json", digests=None)
    with pytest.raises(InputError, match="its SHA-256 is not in run.json"):
        load_run(run)
    assert run_digest(read_record(run)) is None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt"])
def test_a_flipped_bit_is_found(tmp_path, name):
    run = make_run(tmp_path)
    before = run_digest(read_record(run))
    changed = bytearray((run / name).read_bytes())
    changed[len(changed) // 2] ^= 1
    (run / name).write_bytes(changed)
    with pytest.raises(InputError, match=rf"{name}: is not the file that was saved"):
        load_run(run)
    (run / name).unlink()
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        load_run(run)
    save_run(run, make_model(tmp_path / "tiny"), tmp_path / "tiny", make_record(), True)
    assert run_digest(read_record(run)) != before  # the heads are new ones


def test_a_tokenizer_that_was_not_there_is_found(tmp_path):
    run = make_run(tmp_path)
    (run / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="was not there when the run was saved"):
        load_run(run)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    run = make_run(tmp_path)
    model = make_model(tmp_path / "tiny")
    model.heads[1].classifier.bias.data[0] = torch.nan
    with pytest.raises(InputError, match=r"heads\.1\.classifier\.bias"):
        save_run(tmp_path / "new", model, tmp_path / "tiny", make_record(), False)
    assert not (tmp_path / "new").exists()
    save_file(model.state_dict(), run / "model.safetensors")
    trust(run)
    with pytest.raises(InputError, match=r"heads\.1\.classifier\.bias holds NaN or infinity"):
        load_run(run)
    tensors = load_file(run / "model.safetensors")
    save_file(tensors | {"heads.1.classifier.bias": torch.zeros(2, dtype=torch.int64)}, run / "model.safetensors")
    trust(run)
    with pytest.raises(InputError, match="is of type I64"):
        load_run(run)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": ["a", "b", "c"]}, r"classifier.weight is \[2, 16\] and should be \[3, 16\]"),
        ({"exit_layers": [1, 2, 4], "losses": [[1, 1, 1]]}, "heads.2.* is missing"),
        ({"exit_layers": [4], "losses": [[1]]}, "heads.1.* is unexpected"),
        ({"exit_layers": [1, 5], "depth": 5}, r"exit_layers is \[1, 5\], and the model has 4 layers"),
        ({"labels": ["a", "a"]}, "labels is"),
        ({"labels": ["a"]}, "labels is"),
        ({"labels": []}, "labels is"),
        ({"losses": [[1, 2], [1]]}, "losses is"),
        ({"losses": []}, "losses is"),
        ({"losses": [[1]]}, r"losses is \[\[1\]\], which does not fit"),
        ({"exit_layers": []}, "exit_layers is"),
        ({"exit_layers": [4, 1]}, "exit_layers is"),
        ({"metric": "f1"}, "metric is 'f1', and must be 'accuracy' or 'agreement' or 'matthews'"),
        ({"subset": [-1]}, "subset is"),
        ({"digests": {"model.safetensors": 1}}, "digests is"),
        ({"dev_rows": "all"}, "dev_rows is 'all', and must be lists"),
        ({"depth": 10**9}, "depth is 1000000000"),
        ({"text_columns": 5}, "text_columns is 5"),
        ({"text_columns": ["a", "b", "c"]}, "text_columns is"),
        ({"arguments": None}, "model, method, .* missing"),
        ({"arguments": {"max_length": 41}}, "max_length is 41, .* 40 positions"),
        ({"arguments": {"max_length": -1}}, "max_length is -1"),
        ({"arguments": {"max_length": 2**64}}, "max_length is 18446744073709551616"),
        ({"arguments": {"model": "\ud800"}}, r"model is '\\ud800'"),
        ({"arguments": {"model": "a\0"}}, r"model is 'a\\x00'"),
        (
            {"arguments": {"method": "sweet-flow0.5"}},
            "method is .*, should be one of sweet, ee, mm, branch",
        ),
        ({"arguments": {"exit_strategy": "sure"}}, "exit_strategy is 'sure'"),
        ({"arguments": {"lr": 0}}, "lr is 0"),
        ({"arguments": {"seed": True}}, "seed is True"),
    ],
)
def test_an_edited_record_is_refused(tmp_path, changes, reason):
    run = make_run(tmp_path)
    if changes.get("arguments"):
        changes = {"arguments": make_record()["arguments"] | changes["arguments"]}
    edit(run / "run.json", **changes)
    with pytest.raises(InputError, match=reason):
        load_run(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": [50.0, -5.0, 75.0]},
        {"scores": [50.0, 1e9, 75.0]},
        {"scores": [50.0, 75.0]},
        {"area": math.nan},
        {"class_counts": [[1, 3], [2, 3]]},
        {"class_counts": [[1, 3]]},
        {"exit_counts": [[4, 0], [2, 2], [0, 5]]},
        {"thresholds": [0.5, 1.0, 0.75]},
        {"speedup_ratios": [0, 0.6, 1.0]},
        {"exit_layers": [1, 3]},
        {"exit_layers": [4, 1]},
        {"calibration": "platt"},
        {"metric": "f1"},
        {"task": "rte"},
        {"examples": 5},
        {"temperatures": [0, 1]},
        {"operating_point": POINT | {"threshold": 2}},
        {"operating_point": POINT | {"score": "high"}},
        {"operating_point": POINT | {"loss_interval": [1.0]}},
        {"operating_point": POINT | {"wish": {"speed": "fast"}}},
        {"operating_point": POINT | {"wish": {"sure": 90}}},
        {"operating_point": POINT | {"wish": {}}},
        {"operating_point": None},
        {"certainty_ranges": [[0, 1], [0, 1, 1]]},
        {"mean_exit_layers": {"easy": [1, 2]}},
        {"mean_exit_layers": DEEP},
    ],
)
def test_an_edited_evaluation_is_refused(tmp_path, changes):
    run = make_run(tmp_path)
    record = evaluated(run)
    (run / "evaluation.json").write_text(json.dumps(json.loads((run / "evaluation.json").read_text()) | changes))
    with pytest.raises(InputError, match="evaluation.json: ") as error:
        read_evaluation(run, record)
    said = str(error.value)
    assert next(iter(changes)) in said or "NaN" in said or "examples" in changes or "operating_point" in changes


def test_an_evaluation_is_whole_and_of_its_run(tmp_path):
    run, path = make_run(tmp_path), tmp_path / "run" / "evaluation.json"
    record = evaluated(run)
    new = json.loads(path.read_text())
    found = read_evaluation(run, record)
    assert vars(found) | {"operating_point": vars(found.operating_point)} == vars(found) | new
    for key in new.keys() - {"run_digest"}:
        write_json(path, without(new, {key}))
        with pytest.raises(InputError, match=f"{key} missing"):
            read_evaluation(run, record)
    one = {key: EVALUATION[key][:1] for key in ("exit_scores", "class_counts", "temperatures", "exit_layers")}
    write_json(path, new | one | {"exit_counts": [[4]] * 3})
    with pytest.raises(InputError, match=r"exit_layers is \[1\], which does not fit"):
        read_evaluation(run, record)
    write_json(path, new | {"new": "keys are ignored"})
    assert read_evaluation(run, record) == found
    (tmp_path / "other").mkdir()
    other = make_run(tmp_path / "other", "deberta")
    shutil.copyfile(path, other / "evaluation.json")
    for told in (new, without(new, {"run_digest"})):
        write_json(other / "evaluation.json", told)
        with pytest.raises(InputError, match="is of another run"):
            read_evaluation(other, read_record(other))


def test_learning_to_exit_needs_its_ranges(tmp_path):
    run = make_run(tmp_path)
    edit(run / "run.json", arguments=make_record()["arguments"] | {"exit_strategy": "lte"})
    record = evaluated(run)
    edit(run / "evaluation.json", exit_strategy="lte")
    with pytest.raises(InputError, match="certainty_ranges is None"):
        read_evaluation(run, record)
    edit(run / "evaluation.json", certainty_ranges=[[0, 1], [0.5, 0.75]])
    assert read_evaluation(run, record).certainty_ranges == [[0, 1], [0.5, 0.75]]


def test_what_is_not_there_is_none(tmp_path):
    run = make_run(tmp_path)
    assert read_evaluation(run, read_record(run)) is None
    assert read_diverged(run) is None
    write_json(run / "diverged.json", {"error": "--lr", "arguments": make_record()["arguments"]})
    assert read_diverged(run).lr == 1e-3
    write_json(run / "diverged.json", {"error": "--lr", "arguments": make_record()["arguments"] | {"lr": -1}})
    with pytest.raises(InputError, match="lr is -1"):
        read_diverged(run)
    write_json(run / "diverged.json", {"error": "--lr", "arguments": "none"})
    with pytest.raises(InputError, match="diverged.json: model, method, .* missing"):
        read_diverged(run)


def test_names_of_runs_and_methods():
    arguments = make_record()["arguments"] | {"model": "some.one/bert-tiny", "lr": 2e-4, "train_size": 6000}
    assert run_name(arguments) == "bert-tiny-sweet-toy-seed3"
    assert run_name(arguments, in_grid=True) == "bert-tiny-sweet-toy-lr0.0002-n6000-seed3"
    other = arguments | {"method": "sweet-owner1", "exit_strategy": "lte"}
    assert run_name(other, in_grid=True) == "bert-tiny-sweet-owner1-toy-lr0.0002-n6000-seed3-lte"
    on_trunk = {method: method_name({"method": method, "trunk": "runs/a"}) for method in ("ee", "mm", "branch")}
    assert on_trunk == {"ee": "ee-mixed", "mm": "mm-taught", "branch": "branch"}


def test_a_second_training_is_refused_at_once(tmp_path):
    out = tmp_path / "runs" / "a"
    with claim_output(out, False), pytest.raises(InputError, match="is being written by another training"):
        claim_output(out, True).__enter__()
    with claim_output(out, False):
        make_run(tmp_path)
        save_run(out, make_model(tmp_path / "tiny"), tmp_path / "tiny", make_record(), False)
    assert os.listdir(out.parent) == ["a"]
    with pytest.raises(InputError, match="holds a run already"):
        claim_output(out, False).__enter__()
    with claim_output(out, True):
        pass


def test_a_run_that_appears_meanwhile_is_not_lost(tmp_path):
    run = make_run(tmp_path)
    before = content(run)
    with pytest.raises(InputError, match="holds a run already"):
        save_run(run, make_model(tmp_path / "tiny"), tmp_path / "tiny", make_record(), False)
    assert content(run) == before


@pytest.mark.parametrize(
    ("names", "overwrite", "reason"),
    [
        (
            ["run.json", "model.safetensors", "evaluation.json", "logits.safetensors", "curve.png", "vocab.txt"],
            True,
            "",
        ),
        (["run.json", ".evaluation.json.0123456789abcdef.partial"], True, ""),
        (["run.json", ".evaluation.json.4711.partial"], True, "other files than a run's"),
        ([".evaluation.json.0123456789abcdef.partial"], False, ""),
        (["diverged.json"], False, ""),
        (["diverged.json", ".diverged.json.0123456789abcdef.partial"], False, ""),
        ([], False, ""),
        (["run.json"], False, "holds a run already"),
        (["run.json", "notes.txt"], True, "other files than a run's .notes.txt"),
        (["model.safetensors"], True, "other files than a run's"),
    ],
)
def test_what_may_be_replaced(tmp_path, names, overwrite, reason):
    model_folder = write_model(tmp_path / "tiny", "bert")
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("")
    if reason:
        with pytest.raises(InputError, match=reason):
            claim_output(out, overwrite).__enter__()
        assert sorted(os.listdir(out)) == sorted(names)
        return
    with claim_output(out, overwrite):
        save_run(out, make_model(model_folder), model_folder, make_record(), overwrite)
    load_run(out)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "run.json", "vocab.txt"]


def test_outputs_that_cannot_be_are_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name, reason in (
        ("loop", "link to itself"),
        ("file", "is a file"),
        ("file/x", "cannot be"),
        ("a\0", "cannot be"),
    ):
        with pytest.raises(InputError, match=reason):
            claim_output(tmp_path / name, True).__enter__()
    with pytest.raises(InputError, match="no run here"):
        load_run(tmp_path / "loop")


@pytest.mark.slow
def test_a_training_that_is_killed_while_it_replaces_a_run_loses_neither(tmp_path):
    """At every file operation: the run is the old one or the new one, and the next training may go on."""
    run, model_folder = make_run(tmp_path), tmp_path / "tiny"
    old, operation, died = content(run), 0, True
    model, record = make_model(model_folder), make_record(seconds=2.5)
    save_run(tmp_path / "expected", model, model_folder, record, False)
    new = content(tmp_path / "expected")

    def replace() -> None:
        with claim_output(run, True):
            save_run(run, model, model_folder, record, True)

    seen = []
    while died:
        operation += 1
        died = stopped_at(operation, replace)
        read_record(run)  # puts the old one back, where that is needed
        seen.append("old" if content(run) == old else "new" if content(run) == new else "broken")
        with claim_output(run, True):
            assert os.listdir(tmp_path / "run")
        clear_leftovers(run)
        assert sorted(os.listdir(tmp_path)) == ["expected", "run", "tiny"]
        if seen[-1] == "new" and died:
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "expected", run)
            for name, text in old.items():
                (run / name).write_bytes(text)
    assert "broken" not in seen
    assert seen[-1] == "new"
    assert seen.count("old") > 15


def paths_of(value, at=()) -> list[tuple]:
    """The way to every value in a JSON object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [path for key, part in inner for path in paths_of(part, (*at, key))]


def put(content: dict, path: tuple, value) -> dict:
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    if value is DELETE:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return content


DELETE = object()
HOSTILE = [DELETE, None, True, -1, 0, 1, 2, 0.3, 7, 2**31, 10**30, 10**400, 1e300, math.nan, -math.inf, "", "x", "bert"]
HOSTILE += ["a\0", "\ud800", "a\nb", "x" * 5000, [], {}, [1], [[1]], {"a": math.nan}, ["a"] * 1000, "sweet", "ee", "mm"]
HOSTILE += [DEEP]
SHAPES_LOGITS = {"layer_norm_eps", "num_attention_heads"}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Runs of both encoders, and what loading them gives."""
    made = {}
    for model_type in CONFIGS:
        run = make_run(tmp_path_factory.mktemp("run"), model_type)
        evaluated(run)
        made[model_type] = run, outcome(run)
    return made


def outcome(run: Path) -> tuple[torch.Tensor, dict, dict]:
    model, record = load_run(run)
    with torch.no_grad():
        return model(*random_batch()), vars(record), vars(read_evaluation(run, record))


def without(content: dict, keys: set) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_a_mutated_value_is_refused_or_changes_nothing_else(intact, data):
    run, (logits, record, evaluation) = intact[data.draw(st.sampled_from(sorted(intact)))]
    name = data.draw(st.sampled_from(["run.json", "evaluation.json", "config.json", "model.safetensors"]))
    before = (run / name).read_bytes()
    size = int.from_bytes(before[:8], "little") if name == "model.safetensors" else 0
    content = json.loads(before[8 : 8 + size] if size else before)
    path = data.draw(st.sampled_from(paths_of(content)))
    value = data.draw(st.sampled_from(HOSTILE))
    changed = json.dumps(put(content, path, value)).encode()
    try:
        (run / name).write_bytes(len(changed).to_bytes(8, "little") + changed + before[8 + size :] if size else changed)
        found, message = outcome(run), ""
    except InputError as error:
        found, message = None, str(error)
    finally:
        (run / name).write_bytes(before)
    assert message.isprintable()
    assert len(message) <= 400
    if found is None:
        return
    found_logits, found_record, found_evaluation = found
    assert not (isinstance(value, float) and not math.isfinite(value) and name in ("run.json", "evaluation.json"))
    if not (name == "config.json" and path[0] in SHAPES_LOGITS):
        torch.testing.assert_close(found_logits, logits, rtol=0, atol=0)
    keys = set(path) if name == "run.json" else set()
    keys |= {"depth"} if name == "config.json" and path[0] == "num_hidden_layers" else set()
    assert without(found_record, keys) == without(record, keys)
    keys = {path[0]} if name == "evaluation.json" else set()
    assert without(found_evaluation, keys) == without(evaluation, keys)
    assert runs.FILES >= {entry.name for entry in run.iterdir()}


def test_a_finished_classifier_is_a_trunk(tmp_path, model_type):
    save_classifier(tmp_path, model_type)
    _, classifier, _ = load_classifier(tmp_path)
    trunk, labels = load_trunk(tmp_path)
    assert (trunk.exit_layers, labels) == ((4,), ["LABEL_0", "LABEL_1"])
    torch.testing.assert_close(trunk.heads[0].classifier.weight.data, classifier[0], rtol=0, atol=0)
    assert not trunk.training
