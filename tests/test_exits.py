"""Exits: which exit's loss reaches which parameter, and parity with the authors' code."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minisweet import MultiExitModel, build_multi_model, load_encoder
from minisweet.bert import CHECKPOINT_NAMES
from minisweet.exits import EXIT_STRATEGIES, cap_others
from minisweet.files.checkpoint import _sources
from tests.conftest import CHECKOUT, SHARED, random_batch, tiny_encoder, write_model
from train import exit_loss

LABELS = torch.tensor([0, 1, 1, 0])
EXIT_LAYERS = st.sets(st.integers(1, 4), min_size=1).map(lambda layers: tuple(sorted(layers)))


def exit_losses(model, batch, labels):
    return [exit_loss(logits, certainty, labels) for logits, certainty in model.segments(*batch)]


def owners(model, batch) -> dict[str, set[int]]:
    """The ownership matrix: which exits' losses give each parameter a gradient other than zero."""
    matrix = {name: set() for name, _ in model.named_parameters()}
    for k, loss in enumerate(exit_losses(model, batch, LABELS)):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(matrix, gradients, strict=True):
            if gradient is not None and gradient.abs().max() > 0:
                matrix[name].add(k)
    return matrix


def right_owner(name: str, exit_layers: tuple[int, ...]) -> int | None:
    """The exit that SWEET lets update a parameter: the first one after it. None above the last exit."""
    kind, _, rest = name.partition(".")
    if kind == "heads":
        return int(rest.split(".")[0])
    layer = int(rest.split(".")[1]) + 1 if rest.startswith("layers.") else 1  # embeddings and table: the first exit's
    return next((k for k, exit_layer in enumerate(exit_layers) if layer <= exit_layer), None)


@settings(max_examples=16, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]),
    exit_layers=EXIT_LAYERS,
    seed=st.integers(0, 1000),
    strategy=st.sampled_from(EXIT_STRATEGIES),
)
def test_under_sweet_every_parameter_has_exactly_one_owner(model_type, exit_layers, seed, strategy):
    model = MultiExitModel(tiny_encoder(model_type, seed), exit_layers, 2, "sweet", strategy).eval()
    matrix = owners(model, random_batch(seed))
    # With every weight of size 0.2 no gradient is exactly zero by accident.
    for name, exits in matrix.items():
        owner = right_owner(name, exit_layers)
        assert exits == (set() if owner is None else {owner}), name


@settings(max_examples=16, deadline=None)
@given(model_type=st.sampled_from(["bert", "deberta"]), exit_layers=EXIT_LAYERS, seed=st.integers(0, 1000))
def test_under_ee_every_later_exit_is_an_owner_too(model_type, exit_layers, seed):
    model = MultiExitModel(tiny_encoder(model_type, seed), exit_layers, 2, "ee").eval()
    K = len(exit_layers)
    for name, exits in owners(model, random_batch(seed)).items():
        owner = right_owner(name, exit_layers)
        if name.startswith("heads"):
            assert exits == {owner}, name
        else:
            assert exits == (set() if owner is None else set(range(owner, K))), name
        if "embedding" in name or "relative_table" in name:
            assert len(exits) == K, name


def test_sweet_and_ee_have_identical_logits(model_dir):
    torch.manual_seed(0)
    sweet = MultiExitModel(load_encoder(model_dir), (1, 2, 4), 3, "sweet").eval()
    ee = MultiExitModel(load_encoder(model_dir), (1, 2, 4), 3, "ee").eval()
    ee.load_state_dict(sweet.state_dict())
    batch = random_batch()
    assert sweet(*batch).shape == (3, 4, 3)
    torch.testing.assert_close(sweet(*batch), ee(*batch), atol=0, rtol=0)


def test_multi_model_answers_like_its_models(model_dir):
    models = build_multi_model(model_dir, (2, 4), 3).eval()
    batch = random_batch()
    assert models(*batch).shape == (2, 4, 3)
    torch.testing.assert_close(models(*batch)[1], models[1](*batch)[0], atol=0, rtol=0)


def test_a_segment_at_a_time_gives_the_gradients_of_the_summed_loss(model_dir):
    model = MultiExitModel(load_encoder(model_dir), (1, 2, 4), 2, "sweet").eval()
    batch = random_batch()
    sum(exit_losses(model, batch, LABELS)).backward()
    summed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for logits, certainty in model.segments(*batch):
        exit_loss(logits, certainty, LABELS).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, summed[name], atol=1e-6, rtol=1e-6)


def test_what_an_exit_does_not_read_runs_without_gradient_or_not_at_all(model_type):
    seen = {"sweet": [], "ee": []}  # tokens, and whether autograd follows them, in each call of a feed-forward block
    for method, calls in seen.items():
        model = MultiExitModel(tiny_encoder(model_type), (1, 2, 4), 2, method)
        for layer in model.encoder.layers:
            layer.output.register_forward_hook(
                lambda _, __, out, calls=calls: calls.append((out.shape[1], out.requires_grad))
            )
        model(*random_batch())
    last = [(11, True), (1, True)]  # layer 3, and the first token in layer 4
    assert seen["sweet"] == [(1, True), (10, False)] * 2 + last
    assert seen["ee"] == [(1, True), (10, True)] * 2 + last
    calls.clear()
    MultiExitModel(model.encoder, (1, 2), 2, "sweet")(*random_batch())  # which ends before the encoder does
    assert calls == [(1, True), (10, False), (1, True)]


@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_gradients_are_those_of_whole_layers(model_type, method):
    batch, model = random_batch(), with_boundary(model_type, (1, 2, 4), method=method)
    ours = gradients(model, batch)
    model.zero_grad()
    losses, stream = [], model.encoder.embed(batch[0], batch[2])
    for head, start, stop in model.pieces():
        stream = model.encoder.run_layers(stream, batch[1], start, stop)
        losses.append(exit_loss(*head(stream[0]), LABELS))
        if method == "sweet":
            stream = tuple(tensor.detach() for tensor in stream)
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    """Each parameter's gradient of the summed loss, zeros for none."""
    model.zero_grad()
    sum(exit_losses(model, batch, LABELS)).backward()
    zeros = torch.zeros_like
    return {name: zeros(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def with_boundary(model_type, exit_layers, **boundary):
    torch.manual_seed(0)
    return MultiExitModel(tiny_encoder(model_type), exit_layers, 2, **boundary).eval()


def test_the_ends_of_gradient_flow_are_sweet_and_ee_to_the_bit(model_type):
    batch = random_batch()
    for boundary, method in (
        ({"gradient_flow": 0.0}, "sweet"),
        ({"gradient_cap": 0.0}, "sweet"),
        ({"gradient_flow": 1.0}, "ee"),
    ):
        ours = gradients(with_boundary(model_type, (1, 2, 4), **boundary), batch)
        theirs = gradients(with_boundary(model_type, (1, 2, 4), method=method), batch)
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


def test_gradient_flow_multiplies_what_passes_each_boundary(model_type):
    batch = random_batch()
    per_exit = []  # each exit's gradient under EE
    model = with_boundary(model_type, (1, 2, 4), method="ee")
    for loss in exit_losses(model, batch, LABELS):
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        per_exit.append(dict(zip(dict(model.named_parameters()), parts, strict=True)))
    partial = with_boundary(model_type, (1, 2, 4), gradient_flow=0.3)
    assert torch.equal(partial(*batch), model(*batch))
    for name, gradient in gradients(partial, batch).items():
        owner, expected = right_owner(name, (1, 2, 4)), torch.zeros_like(gradient)
        for k in range(owner, 3):
            expected += 0 if per_exit[k][name] is None else 0.3 ** (k - owner) * per_exit[k][name]
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("cap", [0.02, 1e6])
def test_gradient_cap_bounds_the_norm_of_what_passes(model_type, cap):
    batch = random_batch()
    ee, sweet = (with_boundary(model_type, (2, 4), method=method) for method in ("ee", "sweet"))
    stream = ee.encoder.run_layers(ee.encoder.embed(batch[0], batch[2]), batch[1], 0, 2)
    hidden = stream[0].detach().requires_grad_()
    own = torch.autograd.grad(exit_loss(*ee.heads[0](hidden), LABELS), hidden)[0]
    after = ee.encoder.run_layers((hidden, *stream[1:]), batch[1], 2, 4)
    above = torch.autograd.grad(exit_loss(*ee.heads[1](after[0]), LABELS), hidden)[0]
    share = min(1.0, cap * float(own.norm() / above.norm()))
    least, most = gradients(sweet, batch), gradients(ee, batch)
    capped = gradients(with_boundary(model_type, (2, 4), gradient_cap=cap), batch)
    for name in most:
        expected = least[name] + share * (most[name] - least[name])
        torch.testing.assert_close(
            capped[name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    if cap < 1:
        assert cap * own.norm() < above.norm()  # or the test shows nothing


@pytest.mark.parametrize("cap", [0.0, 0.3, 1e6])
def test_the_owner_keeps_the_larger_part_of_each_gradient(model_type, cap):
    batch = random_batch()
    model = with_boundary(model_type, (1, 2, 4), method="ee")
    sweet = gradients(with_boundary(model_type, (1, 2, 4)), batch)
    parts = zip(exit_losses(model, batch, LABELS), model.owned(), strict=True)
    own = [g for loss, owned in parts for g in torch.autograd.grad(loss, owned, retain_graph=True)]
    everything = gradients(model, batch)
    parameters, names = sum(model.owned(), []), {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in parameters} == {name for name in names.values() if "encoder" in name}
    cap_others(parameters, own, cap)
    shares = set()
    for parameter in parameters:
        mine, others = sweet[names[parameter]], everything[names[parameter]] - sweet[names[parameter]]
        share = min(1.0, cap * float(mine.norm() / others.norm())) if others.norm() > 0 else 0.0
        torch.testing.assert_close(parameter.grad, mine + share * others, atol=1e-5, rtol=1e-4)
        shares.add(share)
    assert len(shares) > 3 or cap in (0.0, 1e6)


def test_gradient_cap_is_right_where_a_gradient_is_zero():
    batch = random_batch()

    def norms(k: int, **boundary) -> list[float]:
        """The norms of the four layers' gradients of one exit's loss."""
        model = with_boundary("bert", (1, 2, 4), **boundary)
        exit_losses(model, batch, LABELS)[k].backward()
        gradients = [layer.output.weight.grad for layer in model.encoder.layers]
        return [0.0 if gradient is None else float(gradient.norm()) for gradient in gradients]

    assert norms(0, gradient_cap=0.5) == norms(0)  # nothing comes from above
    # No exit below has a gradient of its own, so that nothing passes: 0 / 0 at the first boundary.
    assert norms(2, gradient_cap=0.5)[:2] == [0, 0]
    assert norms(2, gradient_cap=0.5)[2:] == norms(2)[2:] != [0, 0]


def test_without_flow_each_segment_is_freed():
    assert with_boundary("bert", (1, 2), gradient_cap=0.0).gradient_flow == 0
    assert with_boundary("bert", (1, 2), gradient_cap=0.1).gradient_flow == 1


@pytest.mark.parametrize(
    "boundary",
    [
        {"gradient_flow": 1.5},
        {"gradient_flow": -0.1},
        {"gradient_flow": float("nan")},
        {"gradient_cap": -1.0},
        {"gradient_flow": 0.5, "gradient_cap": 1.0},
        {"gradient_flow": 0.5, "method": "ee"},
        {"gradient_cap": 1.0, "method": "ee"},
    ],
)
def test_a_boundary_that_cannot_be_is_refused(boundary):
    with pytest.raises(ValueError, match="gradient_"):
        with_boundary("bert", (2, 4), **boundary)


@pytest.mark.parametrize("exit_layers", [(), (0, 2), (2, 2), (3, 1), (1, 5)])
def test_exit_layers_must_be_increasing_and_in_the_encoder(exit_layers):
    with pytest.raises(ValueError, match="exit_layers"):
        MultiExitModel(tiny_encoder("bert"), exit_layers, 2)


def test_another_method_or_exit_strategy_is_refused():
    with pytest.raises(ValueError, match="'mm'"):
        MultiExitModel(tiny_encoder("bert"), (1,), 2, "mm")
    with pytest.raises(ValueError, match="'patience'"):
        MultiExitModel(tiny_encoder("bert"), (1,), 2, "sweet", "patience")


def test_learning_to_exit_adds_the_squared_error_of_being_right(model_dir):
    model = MultiExitModel(load_encoder(model_dir), (1, 4), 2, "sweet", "lte").eval()
    batch = random_batch()
    for head, (logits, certainty) in zip(model.heads, model.segments(*batch), strict=True):
        right = [float(row.argmax() == label) for row, label in zip(logits, LABELS, strict=True)]
        squares = [(p.item() - q) ** 2 for p, q in zip(certainty, right, strict=True)]
        expected = F.cross_entropy(logits, LABELS).item() + sum(squares) / len(squares)
        assert exit_loss(logits, certainty, LABELS).item() == pytest.approx(expected, rel=1e-5)
        assert exit_loss(logits, None, LABELS).item() == pytest.approx(F.cross_entropy(logits, LABELS).item())
        assert isinstance(head.lte, torch.nn.Linear)
        assert head.lte.weight.shape == (1, 16)
    hidden = torch.randn(3, 5, 16)
    pooled = head.activation(hidden[:, 0] @ head.pooler.weight.T + head.pooler.bias)
    torch.testing.assert_close(head(hidden)[1], torch.sigmoid(pooled @ head.lte.weight[0] + head.lte.bias))
    *_, (_, certainty) = model.segments(*batch)
    certainty.sum().backward()  # of the last exit: into its pooler and its own segment, and no further
    assert model.heads[1].pooler.weight.grad.abs().max() > 0
    assert all(layer.output.weight.grad.abs().max() > 0 for layer in model.encoder.layers[1:])
    assert model.encoder.layers[0].output.weight.grad is None


def test_dropout_stands_before_the_classifier_alone(tmp_path):
    model = MultiExitModel(load_encoder(write_model(tmp_path, "bert")), (1,), 2)
    head = model.heads[0].train()
    hidden = torch.randn(2000, 1, 16)
    assert isinstance(head.pooler, torch.nn.Linear)
    assert isinstance(head.classifier, torch.nn.Linear)
    pooled = torch.tanh(hidden[:, 0] @ head.pooler.weight.T + head.pooler.bias)
    expected = pooled @ head.classifier.weight.T + head.classifier.bias
    torch.testing.assert_close(head.eval()(hidden)[0], expected)
    torch.testing.assert_close(head.train()(hidden)[0].mean(0), expected.mean(0), atol=0.1, rtol=0.1)
    assert (head(hidden)[0] - expected).abs().max() > 1e-3


OFFICIAL = SHARED / "reference" / "official_minilm_rte.safetensors"
MINILM = CHECKOUT / "weights" / "minilm-l6"


@pytest.mark.skipif(not OFFICIAL.is_file(), reason=f"{OFFICIAL.name}, with GLUE sentences, is not beside the checkout")
@pytest.mark.skipif(not MINILM.is_dir(), reason="minilm-l6 is not in weights/")
@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_logits_losses_and_gradient_norms_are_those_of_the_authors_code(method):
    official = load_file(OFFICIAL)
    model = MultiExitModel(load_encoder(MINILM), (1, 2, 3, 6), 2, method).eval()
    with torch.no_grad():
        for k, head in enumerate(model.heads):
            head.classifier.weight.copy_(official["classifier_weight"][k])
            head.classifier.bias.copy_(official["classifier_bias"][k])
    batch = official["input_ids"], official["attention_mask"], official["token_type_ids"]
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(model(*batch), official[f"logits_{method}"], **close)
    losses = exit_losses(model, batch, official["labels"])
    torch.testing.assert_close(sum(losses)[None], official[f"loss_{method}"], **close)

    parameters = dict(model.named_parameters())
    sources = {
        name: _sources(name.removeprefix("encoder."), CHECKPOINT_NAMES) for name in parameters if "heads" not in name
    }

    def gradient_norms(loss) -> dict[str, torch.Tensor]:
        """The norm of each gradient, by the names of the checkpoint; the poolers' summed, as theirs is one."""
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        gradients = [torch.zeros(1) if gradient is None else gradient for gradient in gradients]
        by_name = dict(zip(parameters, gradients, strict=True))
        theirs = {}
        for name, names in sources.items():
            parts = by_name[name].chunk(len(names)) if by_name[name].numel() > 1 else [by_name[name]] * len(names)
            theirs |= dict(zip(names, parts, strict=True))
        for kind in ("weight", "bias"):
            theirs[f"pooler.dense.{kind}"] = sum(by_name[f"heads.{k}.pooler.{kind}"] for k in range(4))
        return {name: gradient.norm() for name, gradient in theirs.items()}

    compared = 0
    norms = {f"gradnorm_{method}.": gradient_norms(sum(losses))}
    norms |= {f"gradnorm_{method}_exit{k}.": gradient_norms(loss) for k, loss in enumerate(losses)}
    for prefix, ours in norms.items():
        for key in official:
            name = key.removeprefix(prefix).removeprefix("bert.")
            if key.startswith(prefix) and "classifier" not in name and not name.endswith("key.bias"):
                torch.testing.assert_close(
                    ours[name][None], official[key], msg=lambda m, key=key: f"{key}: {m}", **close
                )
                compared += 1
    assert compared > 100
