"""Small texts, unit tables, models and studies that several tests are written with."""

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import csc_array
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from sae_lib.evaluate import Text
from sae_lib.seeds import generator
from sae_lib.study import pipeline
from sae_lib.study.profiles import PROFILES, SMOKE
from sae_lib.transformer import Transformer, TransformerConfig, build, parameters

WORDS = {"letters": "alpha beta gamma delta epsilon zeta eta theta", "numbers": "one two three four five six seven eight"}


def make_text(contexts, documents=None) -> Text:
    """Contexts as held-out text of one domain; each is a document of its own unless told."""
    contexts = torch.as_tensor(contexts)
    if documents is None:
        documents = torch.arange(len(contexts))[:, None].expand_as(contexts)
    return Text(contexts, torch.as_tensor(documents), torch.zeros_like(contexts))


def one_hot_table(text: Text, d_vocab: int) -> csc_array:
    """Unit t fires on token t alone."""
    return csc_array(np.eye(d_vocab, dtype=np.float32)[text.contexts.flatten()])


def table(dense) -> csc_array:
    """A unit table, from all activations [n_tokens, n_units]."""
    return csc_array(np.asarray(dense, dtype=np.float32))


def planted(n_tokens=400, n_units=6, density=0.2, seed=0) -> np.ndarray:
    """Activations of units that fire at random."""
    rng = np.random.default_rng(seed)
    return (rng.random((n_tokens, n_units)) * (rng.random((n_tokens, n_units)) < density)).astype(np.float32)


def scrambled(config: TransformerConfig) -> Transformer:
    """A model whose biases and norms are not at their initial 0 and 1, which would hide mistakes."""
    model, rng = build(config), generator(0, "test-model")
    with torch.no_grad():
        for value in parameters(model).values():
            value.add_(0.3 * torch.randn(value.shape, generator=rng))
    return model.requires_grad_(False)


def pretrained(kind, vocab_size, n_ctx, n_layers=2, **config):
    """A tiny model as others train them: "gpt_neox" or "gpt2"."""
    if kind == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=vocab_size, hidden_size=16, num_hidden_layers=n_layers, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=n_ctx, **config))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=n_layers, n_head=2, n_positions=n_ctx,
                                           **config))
    return model.eval()


def byte_level(texts, vocab_size) -> Tokenizer:
    """A tokenizer of the kind that they bring."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer


def tiny_study(tmp_path, monkeypatch, n_ctx, **profile):
    """Gives studies (by their mode of artefacts) of a profile of seconds, with a small folder of text for its corpus."""
    rng = np.random.default_rng(0)
    for domain, words in WORDS.items():
        (tmp_path / "text" / domain).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "text" / domain / f"{i}.txt").write_text(" ".join(rng.choice(words.split(), 400)))
    tiny = replace(
        SMOKE, name="tiny", corpus=replace(SMOKE.corpus, source=f"files:{tmp_path / 'text'}", target_tokens=8_000),
        tokens=replace(SMOKE.tokens, vocab_size=290, n_ctx=n_ctx, validation_fraction=0.1, test_fraction=0.1),
        transformer=replace(SMOKE.transformer, n_tokens=8_000, d_vocab=290, n_ctx=n_ctx, d_model=16, d_mlp=32, batch_contexts=8),
        stream=replace(SMOKE.stream, tokens_per_context=n_ctx - 1), held_out_contexts=40, bootstrap=20, **profile)
    monkeypatch.setitem(PROFILES, "tiny", tiny)
    monkeypatch.setenv("SAE_ROOT", str(tmp_path))
    monkeypatch.setenv("SAE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SAE_FIGURES", str(tmp_path / "figures"))
    return lambda mode="auto": pipeline.Study("tiny", artefacts=mode)
