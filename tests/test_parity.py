"""Our encoders against `transformers`: every hidden state, on random configurations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet import load_encoder

transformers = pytest.importorskip("transformers", reason="transformers, the reference of these tests, is missing")

CONFIGURATIONS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([1, 2, 4]),
        "hidden_size": st.sampled_from([8, 16, 24]),
        "intermediate_size": st.sampled_from([8, 20]),
        "layer_norm_eps": st.sampled_from([1e-12, 1e-7, 1e-3]),
    }
)


@st.composite
def batches(draw) -> tuple[torch.Tensor, ...]:
    """Ids, any padding pattern that leaves a token in each row, and token types."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    input_ids = torch.randint(0, 50, shape, generator=generator)
    mask = torch.randint(0, 2, shape, generator=generator)
    mask[torch.arange(shape[0]), torch.randint(0, shape[1], (shape[0],), generator=generator)] = 1
    return input_ids, mask, torch.randint(0, 2, shape, generator=generator)


def assert_same_hidden_states(reference_class, config, batch, folder) -> None:
    torch.manual_seed(0)
    reference = reference_class(config).eval()
    for parameter in reference.parameters():  # as drawn by default, position terms would hardly show
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(folder)
    encoder = load_encoder(folder).eval()
    input_ids, mask, token_types = batch
    with torch.no_grad():
        ours = encoder(*batch)
        theirs = reference(
            input_ids=input_ids, attention_mask=mask, token_type_ids=token_types, output_hidden_states=True
        ).hidden_states
    assert len(ours) == config.num_hidden_layers + 1 == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[mask == 1], b[mask == 1], atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(sizes=CONFIGURATIONS, batch=batches())
def test_bert_has_the_hidden_states_of_transformers(tmp_path_factory, sizes, batch):
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, **sizes)
    assert_same_hidden_states(transformers.BertModel, config, batch, tmp_path_factory.mktemp("bert"))


@settings(max_examples=25, deadline=None)
@given(sizes=CONFIGURATIONS, batch=batches(), span=st.sampled_from([-1, 2, 3, 7, 19, 20, 64]))
def test_deberta_has_the_hidden_states_of_transformers(tmp_path_factory, sizes, batch, span):
    config = transformers.DebertaConfig(
        vocab_size=50,
        max_position_embeddings=24,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type="c2p|p2c",
        max_relative_positions=span,
        **sizes,
    )
    assert_same_hidden_states(transformers.DebertaModel, config, batch, tmp_path_factory.mktemp("deberta"))
