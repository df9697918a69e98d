"""A run's model up to one exit as a folder: transformers loads it, and finds the same tokens, logits and labels."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minisweet.base.files import write_json
from minisweet.classifier import export
from minisweet.classifier.deployed import load_run
from minisweet.classifier.fit import load_trunk
from minisweet.classifier.rows import texts_of
from minisweet.texts import Texts
from tests.conftest import random_batch, undecided_model, without_1

transformers = pytest.importorskip("transformers", reason="transformers, which loads the folder, is missing")


@pytest.mark.parametrize("method", ["sweet", "branch"])
def test_transformers_finds_each_exits_logits(model_dir, tmp_path, method):
    model, batch = undecided_model(model_dir, method, num_labels=3), random_batch()
    inputs = dict(zip(("input_ids", "attention_mask", "token_type_ids"), batch, strict=True))
    if model.encoder.config.model_type == "mpnet":
        del inputs["token_type_ids"]  # which it does not read
        inputs["input_ids"] = without_1(batch[0])
    for k, layer in enumerate((1, 2, 4)):
        folder = tmp_path / f"exit{layer}"
        folder.mkdir()
        save_file(export.plain_tensors(model, layer), folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", export.model_config(model.encoder.config, layer, ["a", "b", "c"]))
        theirs, told = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert (theirs.config.num_hidden_layers, theirs.config.id2label) == (layer, {0: "a", 1: "b", 2: "c"})
        with torch.no_grad():
            ours = model(inputs["input_ids"], *batch[1:])[k]
            torch.testing.assert_close(theirs(**inputs).logits, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "layers"), [("bag", [4]), ("mm", [1, 4]), ("pairs", [2]), ("lte", [1])])
def test_command(run_of, tmp_path, command, name, layers):
    """Tokens are ours too, and the folder may be a --trunk."""
    run = load_run(run_of(name), "model", "tokenizer")
    texts = ["the film was superb [SEP]", "", "bad " * 90]
    texts = [(text, "you and i") for text in texts] if name == "pairs" else texts
    for layer in layers:
        out = tmp_path / f"exit{layer}"
        words = ["--exit-layer", layer] if layer < 4 else []
        status, said, err = command(export, run_of(name), "--out", out, *words)
        assert (status, f"the first {layer} layers" in said) == (0, True), err
        assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        trunk = load_trunk(out)
        assert list(theirs.config.id2label.values()) == trunk.labels == run.record.labels
        for text in texts:
            ours = Texts(run.tokenizer, texts_of([text])).batch(np.array([0])).inputs
            encoded = tokenizer(*([text] if isinstance(text, str) else text), truncation=True, return_tensors="pt")
            for tensor, key in zip(ours, ("input_ids", "attention_mask", "token_type_ids"), strict=True):
                assert torch.equal(encoded[key], tensor), key
            with torch.no_grad():
                logits = run.model(*ours)[run.record.exit_layers.index(layer)]
                torch.testing.assert_close(theirs(**encoded).logits, logits, atol=1e-5, rtol=0)
                torch.testing.assert_close(trunk.model(*ours)[-1], logits, atol=1e-5, rtol=0)
        pairs = [("the film", "a")] * 2 if name == "pairs" else ["the film", "a"]
        padded = tokenizer(pairs, padding=True, return_tensors="pt")
        assert padded["attention_mask"].sum(1).tolist() == ([6, 6] if name == "pairs" else [4, 3])
