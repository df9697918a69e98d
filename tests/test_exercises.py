"""The exercises of the tour, minisweet/tour/exercises.md."""

import os
import re
import shlex
import subprocess
import sys
from textwrap import dedent, indent

import pytest
import torch

from minisweet.exits import ExitHead
from tests.conftest import CHECKOUT, tiny_encoder


def test_an_exit_is_a_pooler_and_a_classifier(model_type):
    """Exercise 1."""
    head, x = ExitHead(tiny_encoder(model_type, hidden_dropout_prob=0.5), 3), torch.randn(4, 16)  # (B, D)
    assert not torch.equal(head(x)[0], head(x)[0])  # dropout, in training
    pooled = head.activation(x @ head.pooler.weight.T + head.pooler.bias)  # (B, D)
    logits, certainty = head.eval()(x)
    torch.testing.assert_close(logits, pooled @ head.classifier.weight.T + head.classifier.bias)
    assert certainty is None


@pytest.mark.slow
def test_the_answers_pass_the_tests_that_the_exercises_name_and_no_others_do(tmp_path):
    text = (CHECKOUT / "minisweet" / "tour" / "exercises.md").read_text(encoding="utf-8")
    stub, *answers = map(dedent, re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    commands = re.findall(r"^MINE=my_exits.py python -m (pytest .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    one_exit = stub.replace("    pooled = ...  # (B, D)\n    logits = ...\n", indent(answers[0], "    "))
    installed = one_exit.replace("# exits.", "exits.")  # exercise 4's answer is the package's own function
    ee = installed.replace("        ...\n", indent(answers[1], " " * 8))
    sweet = installed.replace("        ...\n", indent(answers[1] + answers[2], " " * 8))
    file = tmp_path / "my_exits.py"
    for content, passes in ((stub, [0]), (ee, [1, 1, 0]), (sweet, [1, 1, 1, 1])):
        file.write_text(content)
        for is_right, command in zip(passes, commands, strict=False):
            words = [sys.executable, "-m", *shlex.split(command)]
            done = subprocess.run(words, cwd=CHECKOUT, env=os.environ | {"MINE": str(file)}, capture_output=True)
            assert (done.returncode == 0) == is_right, (content, command, done.stdout[-2000:])
