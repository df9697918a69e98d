"""A classifier that was fine-tuned elsewhere as the trunk of own text: its logits, and what is refused."""

import pytest
import torch

from minisweet import load_encoder
from minisweet.classifier.probe import load_classifier
from tests.conftest import CONFIGS, random_batch, refused, rewrite, without_1, write_classifier


def test_a_finished_classifiers_logits_are_those_of_transformers(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**CONFIGS[model_type], id2label={0: "no", 1: "yes"})
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()  # left by the sentence encoder; the classifier reads [CLS] all the same
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model, labels = load_classifier(tmp_path)
    ids, mask, types = random_batch()
    read = {"input_ids": without_1(ids), "attention_mask": mask}
    read |= {} if model_type == "mpnet" else {"token_type_ids": types}
    assert labels == ["no", "yes"]
    torch.testing.assert_close(model(without_1(ids), mask, types), theirs(**read).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id2label": {"0": "a", "1": "a"}}, "id2label is {'0': 'a', '1': 'a'}, should give the classes"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "classifier.weight is [2, 16] and should be [3, 16]"),
        ({"id2label": {"0": "score"}}, "None with 1 outputs, should be single_label_classification with two or more"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification with 2 outputs, should be"),
        ({"left_out": "pooler.dense.weight"}, "pooler.dense.weight is missing"),  # of a classifier of tokens
    ],
)
def test_a_classifier_that_is_no_trunk_is_refused(tmp_path, changes, words):
    folder = write_classifier(tmp_path, **changes)
    rewrite(folder, lambda tensors: tensors | {"qa_outputs.bias": torch.zeros(2)})
    load_encoder(folder)  # which needs none of the heads
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if name != changes.get("left_out")})
    assert words in refused(load_classifier, folder)
