"""The paper's claims, in its order, each on tiny random models: "Finding the SWEET Spot" (Rotem et al. 2023).

A learner's own file runs first with MINE=my_exits.py python -m pytest tests/test_paper.py; see minisweet/tour/.
"""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from minisweet import MultiExitModel, build_multi_model, load_encoder
from minisweet.confidence import CRITERIA, confidence, exits_taken
from minisweet.exits import HEADS, METHODS, Answer, build_models, exit_costs
from minisweet.inference import early_exit
from minisweet.loading import new_encoder
from tests import conftest
from tests.conftest import CONFIGS, random_batch, rewrite, tiny_encoder, undecided_models, write_model

LABELS = torch.tensor([0, 1, 1, 0])
MODEL_TYPES = st.sampled_from([*CONFIGS])
POOLINGS = st.sampled_from(["cls", "mean"])


def test_multi_model_is_models_of_the_first_layers_which_read_no_others(model_dir):
    """Sec. 2 and 3.2: MM's models are the first layers of one checkpoint, and share nothing."""
    whole, batch = load_encoder(model_dir).eval(), random_batch()
    rewrite(model_dir, lambda there: {name: t * (torch.nan if "layer.3" in name else 1) for name, t in there.items()})
    models = build_multi_model(model_dir, (1, 3), 2)  # layer 4 is broken, and nobody reads it
    assert [(len(model.encoder.layers), model.exit_layers) for model in models] == [(1, [1]), (3, [3])]
    assert [model.encoder.depth for model in models] == [4, 4]
    for model, n in zip(models, (1, 3), strict=True):
        torch.testing.assert_close(model.eval().encoder(*batch)[-1], whole(*batch)[n], atol=0, rtol=0)
    small, large = ({parameter.data_ptr() for parameter in model.parameters()} for model in models)
    assert not small & large
    for wrong in [(), (3, 1), (1, 1), (0, 2)]:
        with pytest.raises(ValueError, match="exit_layers is"):
            build_multi_model(model_dir, wrong, 2)


def test_each_exit_has_a_head_which_starts_from_the_checkpoints_pooler(tmp_path):
    """Sec. 2: a classifier after each exit layer. Each has a pooler of its own; the authors' share one."""
    folder = write_model(tmp_path, "bert")
    heads = MultiExitModel(load_encoder(folder), (1, 4), 2).heads
    assert torch.equal(*(head.pooler.weight for head in heads))
    assert heads[0].pooler.weight is not heads[1].pooler.weight
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if "pooler" not in name})
    assert not torch.equal(*(head.pooler.weight for head in MultiExitModel(load_encoder(folder), (1, 4), 2).heads))
    head = MultiExitModel(tiny_encoder("bert", hidden_size=64, initializer_range=0.07), (1,), 40).heads[0]
    assert head.classifier.weight.std().item() == pytest.approx(0.07, rel=0.1)


def test_sweet_and_ee_answer_alike_and_learn_differently(model_dir):
    """Sec. 4: SWEET changes the backward pass alone. From equal weights the logits are equal, to the bit."""
    models, logits = [conftest.model_of(model_dir, method).train() for method in ("ee", "sweet")], []
    for model in models:
        torch.manual_seed(0)  # of dropout
        logits.append(torch.stack([answer.logits for answer in model(*random_batch())]))
        logits[-1].square().sum().backward()
    assert torch.equal(*logits)
    assert not torch.allclose(*(model.encoder.layers[0].output.weight.grad for model in models))


@pytest.mark.parametrize("method", ["sweet", "ee"])
@settings(max_examples=16)
@given(
    model_type=MODEL_TYPES,
    exit_layers=st.sets(st.integers(1, 4), min_size=1).map(lambda layers: tuple(sorted(layers))),
    strategy=st.sampled_from([*HEADS]),
    pooling=POOLINGS,
)
def test_each_parameter_is_updated_by_the_exits_that_the_method_says(
    method, model_type, exit_layers, strategy, pooling
):
    """Sec. 3.1: with EE all later exits update a layer. Sec. 4: with SWEET exactly one classifier updates each."""
    model = MultiExitModel(tiny_encoder(model_type, pooling=pooling), exit_layers, 2, method, strategy).eval()
    found = conftest.owners(model, random_batch(), LABELS)
    assert found == {name: conftest.right_owners(name, exit_layers, method) for name in found}


@settings(max_examples=40)
@given(early=st.sets(st.integers(1, 8)), last=st.integers(1, 9), method=st.sampled_from([*METHODS]))
def test_exit_costs_are_those_of_equation_1(early, last, method):
    """Eq. 1: the share of the layers that have run when an exit answers. MM adds up the models before."""
    layers = [*sorted(n for n in early if n < last), last]
    config = tiny_encoder("bert", num_hidden_layers=9).config
    run, costs = 0, exit_costs(build_models(method, lambda n: new_encoder(config, n), layers, 2))
    for n, cost in zip(layers, costs, strict=True):
        run = run + n if method == "mm" else n
        assert cost == pytest.approx(run / 9)


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_thresholds_go_from_1_over_c_where_all_exit_to_1_where_none_does(num_labels, seed):
    """Sec. 3.3, whatever rounding does. Between them: the first exit that is confident enough, or the last."""
    logits = torch.randn(3, 6, num_labels, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] = 7.3  # all equal: a confidence that may round below 1/C
    logits[:, 1] *= 1e4  # certain: a confidence that rounds to 1
    sure = torch.stack([confidence("confidence", Answer(of_exit), [1.0]) for of_exit in logits])  # (K, N)
    lowest, *between, highest = np.linspace(CRITERIA["confidence"].lowest(num_labels), 1, 11).tolist()
    for threshold in (0.0, 1 / num_labels, lowest):
        assert exits_taken(sure, threshold).tolist() == [0] * 6
    for threshold in (highest, 0.99999998, 1.5):
        assert exits_taken(sure, threshold).tolist() == [2] * 6
    for threshold in (*between, sure[0, 3].item()):  # also one that is reached exactly
        expected = [(*(of_text[:2] >= torch.tensor(threshold)).tolist(), True).index(True) for of_text in sure.T]
        assert exits_taken(sure, threshold).tolist() == expected


@settings(max_examples=16)
@given(
    model_type=MODEL_TYPES,
    method=st.sampled_from([*METHODS]),
    strategy=st.sampled_from([*HEADS]),
    num_labels=st.integers(2, 3),
    seed=st.integers(0, 10**6),
    pooling=POOLINGS,
)
def test_live_decides_as_the_sweep(tmp_path_factory, model_type, method, strategy, num_labels, seed, pooling):
    """Sec. 3.3: the sweep over the exits' logits is exact."""
    folder = write_model(tmp_path_factory.mktemp("live"), model_type)
    models = undecided_models(folder, method, (1, 2, 4), num_labels, strategy, seed, pooling)
    conftest.live_as_swept(models, random_batch(seed, batch=16), torch.randint(num_labels, (16,)), strategy)


@pytest.mark.parametrize("method", METHODS)
def test_a_text_that_exits_is_not_computed_further(tmp_path, model_type, method):
    """Sec. 2: a text that leaves saves the layers after its exit. Nothing runs in vain, padding included."""
    models, batch = undecided_models(write_model(tmp_path, model_type), method, seed=1), random_batch(3, batch=16)
    seen, expected, none = Counter(), Counter(), [[1.0]] * 3
    for layer in (layer for model in models for layer in model.encoder.layers):
        layer.register_forward_pre_hook(lambda _, inputs: seen.update([tuple(inputs[0].shape[:2])]))
    exits, lengths, rows = early_exit(models, *batch, 0.75, none).exits, batch[1].sum(1), torch.arange(16)
    for k, layers in enumerate((1, 2, 4) if method == "mm" else (1, 1, 2)):  # layers that run for each exit
        rows = rows[exits[rows] >= k]
        if len(rows):
            expected[len(rows), int(lengths[rows].max())] += layers
    assert len(exits.unique()) > 1
    assert seen == expected
    seen.clear()
    early_exit(models, *batch, 0.5, none)  # all leave at the first exit
    assert [*seen.elements()] == [(16, int(lengths.max()))]


def test_learning_to_exit_is_a_sigmoid_of_what_the_head_pools_and_trains_its_layers(model_dir):
    """Sec. 5. That its target is 1 where the classifier is right, and 0 elsewhere, stands in test_exits.py."""
    model = conftest.model_of(model_dir, "sweet", (1, 4), strategy="lte").eval()
    head, batch = model.heads[1], random_batch()
    certainty, pooled = model(*batch)[1].certainty, head.pooled(model.encoder(*batch)[4][:, 0])
    torch.testing.assert_close(certainty, torch.sigmoid(pooled @ head.lte.weight[0] + head.lte.bias))
    certainty.sum().backward()
    assert [layer.output.weight.grad is not None for layer in model.encoder.layers] == [False, True, True, True]


@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_training_is_adamw_on_the_clipped_gradient_of_the_summed_loss(tmp_path, model_type, method):
    """App. A, and the authors' clipping. Against a loop that holds the whole graph and uses another AdamW."""
    folder = write_model(tmp_path / "tiny", model_type, **conftest.NO_DROPOUT)
    examples, ours = conftest.toy_examples(folder, range(24), 16), conftest.model_of(folder, method)
    for head in ours.heads:
        torch.nn.init.normal_(head.classifier.weight, std=0.3)  # some steps are clipped, and would not be with the mean
    plain, batches = copy.deepcopy(ours), [*examples.shuffled(8, 5, 0), *examples.shuffled(8, 5, 1)]
    history = train.fine_tune(ours, examples, epochs=2, batch_size=8, lr=1e-2, seed=5)
    parameters, norms = list(plain.parameters()), []
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=0.0, foreach=False)
    for step, batch in enumerate(batches):
        losses = [F.cross_entropy(answer.logits, batch.labels) for answer in plain(*batch.inputs)]
        assert history[step] == pytest.approx([loss.item() for loss in losses], abs=1e-3)
        optimizer.zero_grad()
        sum(losses).backward()
        norms.append(torch.sqrt(sum(parameter.grad.square().sum() for parameter in parameters)))
        for parameter in parameters:
            parameter.grad /= max(1.0, norms[-1])
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)  # a linear decay
        optimizer.step()
    assert max(norms) > 1.2
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
