"""Small texts and unit tables that several tests are written with."""

import numpy as np
import torch
from scipy.sparse import csc_array

from sae_lib.evaluate import Text


def make_text(contexts, documents=None) -> Text:
    """Contexts as held-out text of one domain; each is a document of its own unless told."""
    contexts = torch.as_tensor(contexts)
    if documents is None:
        documents = torch.arange(len(contexts))[:, None].expand_as(contexts)
    return Text(contexts, torch.as_tensor(documents), torch.zeros_like(contexts))


def one_hot_table(text: Text, d_vocab: int) -> csc_array:
    """Unit t fires on token t alone."""
    return csc_array(np.eye(d_vocab, dtype=np.float32)[text.contexts.flatten()])
