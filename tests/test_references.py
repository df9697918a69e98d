"""The encoders compute what transformers computed for tests/references, without transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minisweet import load_encoder
from tests.conftest import note_difference
from tests.references.__main__ import differences


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_hidden_states_are_those_that_transformers_computed(model_type, mode):
    """In training without dropout, attention has a code path of its own on a CPU."""
    folder = Path(__file__).with_name("references") / model_type
    stored = load_file(folder / "states.safetensors")
    ids, mask, types = (stored[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    encoder, theirs = load_encoder(folder).train(mode == "training"), stored["hidden_states"]  # (L+1, N, D)
    with torch.no_grad():
        ours = torch.stack(encoder(ids, mask, types))[:, mask == 1]
        alone = torch.stack(encoder(ids[:1]))[:, 0]  # the longest text, with the default mask and types
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, theirs[:, : len(ids[0])], atol=1e-5, rtol=0)
    note_difference(f"hidden states of {model_type} in {mode}, beside the references", ours, theirs)


def test_a_checkpoint_is_compared_with_transformers_by_one_command():
    pytest.importorskip("transformers")
    assert max(differences(Path(__file__).parent / "references" / "mpnet")) < 1e-5
