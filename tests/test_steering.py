import numpy as np
import pytest
import torch

from sae_lib.effects import fluency
from sae_lib.errors import StudyError
from sae_lib.evaluate import Text
from sae_lib.steering import DomainClassifier, Gauge, as_text, windows
from sae_lib.transformer import TransformerConfig, build

DOMAINS = ["prose", "arabic", "absent", "base64"]
VOCABULARY = [b"", b"a", b"b", "م".encode()[:1], "م".encode()[1:], b"Q9x", b" "]


def classifier(tokens=(1, 2, 1, 2, 1, 0, 3, 4, 3, 4, 5, 5, 5, 1), labels=(0,) * 6 + (1,) * 4 + (3,) * 4):
    return DomainClassifier(np.array(tokens, np.uint16), np.array(labels, np.uint8), DOMAINS, len(VOCABULARY))


# --- the classifier --------------------------------------------------------------------------------------------------

def test_the_likeliest_domain_by_hand():
    """P(token | domain) = (count + 1) / (tokens + 7): prose 4, 3 of 12; arabic 3, 3 of 11; base64: 5 has 4, 1 has 2 of 11."""
    found = classifier()(torch.tensor([[1, 2, 1], [3, 4, 3], [5, 5, 1], [5, 1, 1]]))
    # 5 1 1: prose 1/12 (4/12)^2 = 0.0093, base64 4/11 (2/11)^2 = 0.0120
    assert found == ["prose", "arabic", "base64", "base64"]
    # 5 1 1 1: prose 0.0031, base64 0.0022
    assert classifier()(torch.tensor([[5, 1, 1, 1]])) == ["prose"]


def test_a_common_domain_has_no_head_start_and_an_absent_one_no_part():
    often = classifier(tokens=(1, 2) * 500 + (5, 5), labels=(0,) * 1000 + (3, 3))
    assert often(torch.tensor([[5]])) == ["base64"]
    # A token nobody uses is likeliest in the domain with the least text; one without any would win.
    assert often(torch.tensor([[6]])) == ["base64"]


def test_end_of_text_says_nothing():
    assert classifier()(torch.tensor([[5, 0, 0, 0]])) == ["base64"]
    for tokens in ((), (0, 0)):
        with pytest.raises(StudyError, match="no text to learn"):
            classifier(tokens, (0,) * len(tokens))


def test_counting_in_parts_changes_nothing(monkeypatch):
    pieces = torch.randint(1, 7, (50, 5), generator=torch.Generator().manual_seed(0))
    whole = classifier()(pieces)
    monkeypatch.setattr("sae_lib.steering.COUNTED", 3)
    assert classifier()(pieces) == whole


# --- real text -------------------------------------------------------------------------------------------------------

def test_windows_lie_in_one_document_of_the_domain():
    contexts = torch.tensor([[1, 2, 1, 2, 1, 2, 1], [1, 0, 1, 1, 2, 2, 1]], dtype=torch.int32)
    documents = torch.tensor([[1, 1, 1, 2, 3, 3, 3], [4, 4, 4, 4, 4, 4, 4]])
    domains = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    text = Text(contexts, documents, domains)
    assert windows(text, 1, 2).tolist() == [[1, 2], [1, 1], [2, 2]]  # 1 2 of documents 1 and 2, and 1 0, are left out
    assert windows(text, 1, 3).tolist() == [[1, 2, 1], [1, 2, 2]]
    assert windows(text, 2, 2).shape == (0, 2)
    assert windows(text, 1, 8).shape == (0, 8)


def test_text_of_pieces_of_characters():
    assert as_text(torch.tensor([1, 3, 4, 3]), VOCABULARY) == "aم\ufffd"


# --- the gauge -------------------------------------------------------------------------------------------------------

@pytest.fixture
def model():
    return build(TransformerConfig(n_tokens=1, d_vocab=7, n_ctx=32, d_model=16, n_heads=2, d_mlp=24)).requires_grad_(False)


def gauge(model):
    return Gauge(model, VOCABULARY, classifier(), prompt_length=2, seed=0, n_boot=50)


def test_shares_and_costs_by_hand(model):
    arabic, prose = [3, 4] * 5, [1, 2] * 5
    # The prompt is Arabic and does not count. Written: 20 Arabic tokens are 10 letters, 10 of each kind are 5 and 10.
    samples = torch.tensor([[3, 4] + arabic + arabic, [3, 4] + arabic + prose])
    found = gauge(model)(samples, "arabic")
    assert found["share"] == pytest.approx(15 / 25)
    assert found["classified"] == pytest.approx(3 / 4)
    assert found["low"] <= found["share"] <= found["high"]
    assert (found["classified_low"], found["classified_high"]) == (0.5, 1.0)
    expected = fluency(model, samples, 2)
    assert found["log_likelihood"] == pytest.approx(expected.log_likelihood.mean().item())
    assert found["distinct"] == pytest.approx((2 / 20 + 4 / 20) / 2)


def test_a_context_without_a_character_test_is_measured_by_the_classifier(model):
    samples = torch.tensor([[1, 1] + [1, 2] * 5, [1, 1] + [3, 4] * 5])
    found = gauge(model)(samples, "prose")
    assert found["share"] == found["classified"] == 0.5


def test_samples_too_short_for_a_piece_are_refused(model):
    with pytest.raises(StudyError, match="shorter than the 10"):
        gauge(model)(torch.ones(3, 11, dtype=torch.int64), "arabic")
