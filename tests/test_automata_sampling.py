import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csc_array
from texts import make_text, one_hot_table

from sae_lib.automata_sampling import prompts, their_documents, unlinked, verify
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.transformer import TransformerConfig, build, parameters

# --- verification ----------------------------------------------------------------------------------------------------

D_VOCAB = 8


def markov_model(transitions: np.ndarray):
    """A model that predicts the next token by the given probabilities, and whose neuron t is active on token t alone."""
    config = TransformerConfig(n_tokens=1, d_vocab=D_VOCAB, n_ctx=32, d_model=16, n_heads=2, d_mlp=D_VOCAB)
    model = build(config).requires_grad_(False)
    p = parameters(model)
    for name, value in p.items():
        value.fill_(float(".ln" in name or name == "ln_out.weight") if name.endswith(".weight") else 0.0)
    embedding = torch.randn(D_VOCAB, 16, dtype=torch.float64)
    p["tok_embed.weight"].copy_(embedding)
    inverse = torch.linalg.pinv(torch.nn.functional.layer_norm(embedding, (16,)))  # [16, d_vocab]
    p["layers.0.mlp.fc_in.weight"].copy_(inverse.T)
    p["layers.0.mlp.fc_in.bias"].fill_(-0.5)
    p["head.weight"].copy_((inverse @ torch.from_numpy(np.log(transitions))).T)
    return model


def two_states() -> np.ndarray:
    """From 1 to 2 and from 2 to 1 at 0.9, to end-of-text at 0.04, elsewhere at 0.06; the others go anywhere."""
    transitions = np.full((D_VOCAB, D_VOCAB), 1 / D_VOCAB)
    for i, j in [(1, 2), (2, 1)]:
        transitions[i] = 0.06 / 5
        transitions[i, [i, 0, j]] = [1e-9, 0.04, 0.9]
    return transitions / transitions.sum(1, keepdims=True)


def random_text(n_contexts=60) -> Text:
    return make_text(torch.randint(0, D_VOCAB, (n_contexts, 32), generator=torch.Generator().manual_seed(0)))


def test_sampling_finds_the_rates_that_the_model_was_made_with():
    text = random_text()
    found = verify(markov_model(two_states()), torch.nn.Identity(), (1, 2), one_hot_table(text, D_VOCAB), text)
    expected = 0.9 / 0.96  # end-of-text does not count
    assert found.n_prompts == 40
    assert found.hand_over[0, 1] == pytest.approx(expected, abs=0.04)
    assert found.hand_over[1, 0] == pytest.approx(expected, abs=0.04)
    assert found.hand_over[0, 0] == found.hand_over[1, 1] == 0
    assert found.stay.value == pytest.approx(expected, abs=0.03)
    assert found.stay.low < expected < found.stay.high
    tokens = text.contexts[text.contexts != 0]
    assert found.base_rate == pytest.approx((tokens <= 2).float().mean().item())
    np.testing.assert_allclose(found.state_rates, [(tokens == t).float().mean() for t in (1, 2)], rtol=1e-6)


def test_states_that_do_not_lead_to_each_other_stay_no_longer_than_chance():
    text = random_text()
    found = verify(markov_model(np.full((D_VOCAB, D_VOCAB), 1 / D_VOCAB)), torch.nn.Identity(), (1, 2),
                   one_hot_table(text, D_VOCAB), text)
    assert found.stay.low < 2 / 7 < found.stay.high
    assert abs(found.stay.value - found.base_rate) < 0.1


def test_a_deterministic_model_never_leaves_whatever_the_seed():
    transitions = np.full((D_VOCAB, D_VOCAB), 1e-12)
    for i, j in zip(range(D_VOCAB), [1, 2, 3, 1, 5, 4, 7, 6], strict=True):
        transitions[i, j] = 1
    text = random_text(12)
    found = verify(markov_model(transitions), torch.nn.Identity(), [1, 2, 3], one_hot_table(text, D_VOCAB), text, seed=5,
                   n_prompts=6, n_tokens=5, n_samples=2, n_boot=20)
    assert found.stay == (1, 1, 1)
    np.testing.assert_array_equal(found.hand_over, np.roll(np.eye(3), 1, axis=1))
    assert found.n_prompts == 6


def test_what_is_written_after_the_end_of_a_text_does_not_count():
    transitions = np.full((D_VOCAB, D_VOCAB), 1e-12)
    transitions[:, 5] = 1  # everything leads to 5,
    transitions[1, [0, 1, 5]] = [0.5, 0.5, 1e-12]  # but 1 stays or ends the text,
    transitions[0, [4, 5]] = [1, 1e-12]  # and the next text begins with 4, which does not stay
    text = random_text()
    table = one_hot_table(text, D_VOCAB).toarray()
    table[:, 4] = 0  # so that every prompt ends in 1
    found = verify(markov_model(transitions), torch.nn.Identity(), (1, 4), csc_array(table), text, n_boot=20)
    assert found.n_prompts == 20
    assert found.stay == (1, 1, 1)


def test_states_that_fire_in_one_document_cannot_be_verified():
    text = random_text(3)
    table = one_hot_table(text, D_VOCAB).toarray()
    table[32:] = 0
    with pytest.raises(StudyError, match="fire in 1 documents"):
        verify(markov_model(two_states()), torch.nn.Identity(), (1, 2), csc_array(table), text)


def test_rates_of_the_real_text_by_hand():
    # States 1 and 2 fire on 4 of the 7 tokens of documents 0 and 2; of these, three have a next token and one stays.
    with_states, without = [1, 2, 3, 2, 4, 5, 1, 0], [3, 4, 5, 6, 7, 3, 4, 0]
    text = make_text(np.pad([with_states, without, with_states], ((0, 0), (0, 24))))
    table = one_hot_table(text, D_VOCAB)
    found = verify(markov_model(two_states()), torch.nn.Identity(), (1, 2), table, text, n_prompts=8, n_samples=1, n_boot=5)
    assert found.base_rate == pytest.approx(8 / 21)
    assert found.document_rate == pytest.approx(4 / 7)
    assert found.text_stay == pytest.approx(1 / 3)
    np.testing.assert_allclose(found.state_rates, [4 / 21, 4 / 21])


def test_prompts_end_where_they_may_and_leave_room():
    text = random_text()
    table = one_hot_table(text, D_VOCAB)
    assert np.array_equal(their_documents(table, text, [3]).reshape(-1, 32).any(1), (text.contexts == 3).any(1).numpy())
    where = np.zeros(text.contexts.shape, dtype=bool)
    where[10:20] = True
    found = prompts(table, text, [3, 5], where.flatten(), n_prompts=40, n_tokens=12, seed=0)
    assert all(10 <= context < 20 and position < 20 and text.contexts[context, position] in (3, 5) for context, position in found)
    assert len(found) == sum(int((text.contexts[10:20, :20] == t).any(1).sum()) for t in (3, 5))
    with pytest.raises(StudyError, match="fire in 0 documents"):
        verify(markov_model(two_states()), torch.nn.Identity(), (3, 5), table, text, where=np.zeros(table.shape[0], dtype=bool))


# --- the control -----------------------------------------------------------------------------------------------------

def linked(*pairs) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["source", "target"])


def control_case():
    """Unit 0 fires in document 0 alone, where the units fire on 6, 6, 5, 4, 3 and 1 tokens; unit 3 also on 2 elsewhere."""
    text = make_text(np.ones((2, 20), dtype=np.int64))
    dense = np.zeros((40, 6), dtype=np.float32)
    for unit, times in enumerate([6, 6, 5, 4, 3, 1]):
        dense[:times, unit] = 1
    dense[20:22, 3] = 1
    return csc_array(dense), text


@pytest.mark.parametrize(("edges", "expected"), [
    (linked(), 1),
    (linked((1, 1)), 2),  # a self-loop of its own; unit 3 fires 6 times too, but not there
    (linked((0, 1), (2, 0)), 3),  # an edge from or to the state
    (linked((0, 5), (5, 1), (1, 4), (4, 0)), 2),  # of its component, though not next to it
    (linked((1, 2)), 1),  # one end of an edge to a unit that is not of the control
])
def test_the_control_fires_as_often_in_the_same_documents_and_is_not_linked(edges, expected):
    assert unlinked((0,), edges, *control_case(), min_fired=1) == (expected,)


def test_units_of_a_control_are_not_linked_to_each_other_and_fire_often_enough():
    assert unlinked((0, 1), linked(), *control_case(), min_fired=1) == (2, 3)
    assert unlinked((0, 1), linked((2, 3)), *control_case(), min_fired=1) == (2, 4)
    assert unlinked((0, 1), linked((3, 2), (4, 4)), *control_case(), min_fired=1) == (2, 5)
    assert unlinked((0,), linked((1, 1), (2, 2)), *control_case(), min_fired=6) == (3,)
    with pytest.raises(StudyError, match="No unit is left"):
        unlinked((0,), linked(), *control_case(), min_fired=7)
