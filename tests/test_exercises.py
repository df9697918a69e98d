"""The exercises of the tour, minisweet/tour/exercises.md: tests that they name, and their answers."""

import math
import os
import re
import shlex
import subprocess
import sys
from textwrap import dedent, indent

import pytest
import torch

from minisweet import MultiExitModel, load_encoder
from minisweet.base.files import read_json
from minisweet.checkpoint import CLASSIFIERS
from minisweet.confidence import CRITERIA
from minisweet.exits import Answer, ExitHead
from minisweet.loading import ARCHITECTURES
from tests import conftest
from tests.conftest import CHECKOUT, CONFIGS, random_batch, tiny_encoder, write_model

LABELS = torch.tensor([0, 1, 1, 0])


def test_an_exit_is_a_pooler_and_a_classifier(model_type):
    """Exercise 1."""
    head, x = ExitHead(tiny_encoder(model_type, hidden_dropout_prob=0.5), 3), torch.randn(4, 16)  # (B, D)
    assert not torch.equal(head(x).logits, head(x).logits)  # dropout, in training
    pooled = head.activation(x @ head.pooler.weight.T + head.pooler.bias)  # (B, D)
    answer = head.eval()(x)
    torch.testing.assert_close(answer.logits, pooled @ head.classifier.weight.T + head.classifier.bias)
    assert answer.certainty is None


@pytest.mark.parametrize(("heads", "eps", "span"), [(1, 1e-3, -1), (4, 1e-12, 6)])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_encoder_reads_a_checkpoint_as_transformers_does_and_learns_with_sweet(
    tmp_path, model_type, heads, eps, span
):
    """Exercise 9 adds roberta."""
    transformers = pytest.importorskip("transformers")
    config = CONFIGS.get(model_type, CONFIGS["bert"] | {"type_vocab_size": 1})
    config = config | {"model_type": model_type, "max_position_embeddings": 42, "max_relative_positions": span}
    config |= {"num_attention_heads": heads, "layer_norm_eps": eps}
    reference = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config)).eval()
    for parameter in reference.parameters():  # as drawn by default, position terms would hardly show
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    ids, mask, _ = random_batch()
    ids = conftest.without_1(ids)  # padding in MPNet and RoBERTa
    with torch.no_grad():
        theirs = reference(ids, mask, output_hidden_states=True).hidden_states
        ours = load_encoder(tmp_path)(ids, mask, torch.zeros_like(ids))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[mask == 1], b[mask == 1], atol=1e-5, rtol=0)
    model = MultiExitModel(load_encoder(tmp_path), (1, 3), 2, "sweet")
    assert (model.heads[0].pooler_dropout.p > 0) is (CLASSIFIERS[model_type][0] == "classifier.dense")
    owners = conftest.owners(model, (ids, mask), LABELS)
    assert owners == {name: conftest.right_owners(name, (1, 3), "sweet") for name in owners}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_decides_live_as_in_the_sweep(tmp_path, criterion):
    """Exercise 10 adds entropy."""
    strategy = "lte" if criterion == "lte" else "confidence"
    models = conftest.undecided_models(write_model(tmp_path, "bert"), "sweet", num_labels=3, strategy=strategy)
    sure = conftest.live_as_swept(models, random_batch(batch=32), torch.arange(32) % 3, criterion)
    assert len(sure.unique()) > 20
    if strategy == "confidence":
        logits = torch.tensor([[2.0, 2.0, 2.0], [3.0, 1.0, 1.0], [3.0, 1.0, -9.0], [9.0, -9.0, -9.0]])
        p = (logits / 2).double().softmax(-1)
        found, entropy = CRITERIA[criterion].confidence(Answer(logits), torch.tensor([2.0])), -(p * p.log()).sum(-1)
        expected = 1 - entropy / math.log(3) if criterion == "entropy" else p.amax(-1)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def run_python(folder, *words, right=(0,), **environment) -> subprocess.CompletedProcess:
    """Run Python with these words in a folder where the clone's modules are found; its status is to be right."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True)
    assert done.returncode in right, done.stderr
    return done


TRAINING = "--model tiny --exit-layers 1,2,4 --train-size 64 --epochs 1 --max-length 32 --amp off --lr 1e-3".split()


def filled(stub: str, answers: list[str]) -> str:
    """A stub whose first lines of "..." are replaced by answers, one each."""
    for answer in answers:
        space = re.search(r"^( *)\.\.\.$", stub, re.MULTILINE)
        stub = stub[: space.start()] + indent(answer, space[1]).rstrip() + stub[space.end() :]
    return stub


@pytest.fixture(scope="module")
def exercises() -> dict[int, tuple[list[str], str]]:
    """By the number of an exercise: its blocks of Python, and the words after `python -m pytest`."""
    text = (CHECKOUT / "minisweet" / "tour" / "exercises.md").read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        blocks = map(dedent, re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL))
        tests = re.findall(r"^MINE=\w+\.py python -m pytest (.*)$", part, re.MULTILINE)
        found[int(part.split(".")[0])] = [*blocks], "".join(tests)
    assert [number for number, (_, tests) in found.items() if tests] == [1, 2, 3, 4, 5, 9, 10]
    return found


def passes(file, content: str, tests: str) -> bool:
    """Whether tests pass with this content in a learner's own file."""
    file.write_text(content)
    words = "-m", "pytest", "-q", "-p", "no:cacheprovider", *shlex.split(tests)
    right = 0, 1, 5  # passed, failed, no test of that name
    return run_python(CHECKOUT, *words, right=right, MINE=str(file)).returncode == 0


@pytest.mark.slow
def test_the_answers_to_exercises_1_to_5_pass_their_tests_and_the_stubs_do_not(tmp_path, exercises):
    stub, *answers = exercises[1][0]
    for number in (2, 3, 4, 5):
        answers += exercises[number][0]
    head, ee, sweet, half, title, mm, costs, loop = answers
    steps = [  # the file before and after each exercise: what fills its functions, and how many of them are installed
        (1, [], [head], 1),
        (2, [head], [head, ee], 2),
        (3, [head, ee], [head, ee + sweet], 2),
        (4, [head, ee + sweet], [head, ee + sweet, mm, costs], 4),
        (5, [head, ee + sweet, mm, costs], [head, ee + sweet, mm, costs, loop], 5),
    ]
    for number, before, after, installed in steps:
        file = stub
        for _ in range(1, installed):
            file = re.sub(r"^# (?=exits|train)", "", file, count=1, flags=re.MULTILINE)
        assert not passes(tmp_path / "my_exits.py", filled(file, before), exercises[number][1]), number
        assert passes(tmp_path / "my_exits.py", filled(file, after), exercises[number][1]), number
    # A method of one's own, and the weighted loss of exercise 8: trained and evaluated in the learner's own file.
    whole = filled(file, [head, ee + sweet + half, mm, costs, loop]).replace("exits.ExitHead", title + "exits.ExitHead")
    (weighted,) = exercises[8][0]
    assert "sum(losses).backward()\n" in whole
    write_model(tmp_path / "tiny", "bert")
    losses = {}
    twice = whole.replace("sum(losses).backward()\n", weighted)
    for out, content, method in (("once", whole, "ee"), ("half", whole, "half"), ("twice", twice, "ee")):
        (tmp_path / "my_exits.py").write_text(content)
        run_python(tmp_path, "my_exits.py", "train", *TRAINING, "--method", method, "--out", out)
        run_python(tmp_path, "my_exits.py", "evaluate", out)
        losses[out] = read_json(tmp_path / out / "run.json")["losses"][0]
    first, second = ({str(steps[n]) for steps in losses.values()} for n in (0, 1))
    assert (len(first), len(second)) == (1, 3)  # equal losses at the first step, and others from then on


@pytest.mark.slow
def test_the_answer_to_exercise_7_reads_what_evaluate_writes(tmp_path, exercises):
    write_model(tmp_path / "tiny", "bert")
    run_python(tmp_path, CHECKOUT / "train.py", *TRAINING, "--out", "runs/minilm-l6-sweet-toy-seed0")
    run_python(tmp_path, CHECKOUT / "evaluate.py")
    done = run_python(tmp_path, "-c", exercises[7][0][0])
    threshold, points = map(float, re.findall(rb"[-\d.]+", done.stdout.splitlines()[0]))
    assert (0.5 <= threshold <= 1, abs(points) < 20) == (True, True)


@pytest.mark.slow
def test_the_answer_to_exercise_9_passes_its_test(tmp_path, exercises):
    (answer,), tests = exercises[9]
    wrong = answer.replace("ClassVar[int] = 2", "ClassVar[int] = 1")
    for content, is_right in (("", False), (wrong, False), (answer, True)):
        assert passes(tmp_path / "my_roberta.py", content, tests) == is_right


@pytest.mark.slow
def test_the_answer_to_exercise_10_passes_its_test_and_evaluates_and_predicts(tmp_path, exercises):
    (stub, answer), tests = exercises[10]
    file = tmp_path / "my_entropy.py"
    assert not passes(file, stub, tests)
    assert passes(file, filled(stub, [answer]), tests)
    write_model(tmp_path / "tiny", "bert")
    (tmp_path / "new.tsv").write_text("sentence\nThe desk was superb.\n")
    run_python(tmp_path, CHECKOUT / "train.py", *TRAINING, "--out", "run")
    run_python(tmp_path, file, "run", "--criterion", "entropy")
    assert read_json(tmp_path / "run" / "evaluation.json")["criterion"] == "entropy"
    done = run_python(tmp_path, file, "run", "--predict", "new.tsv", "--threshold", "0.5")
    assert len(done.stdout.split()) == 3  # label, confidence, exit layer
