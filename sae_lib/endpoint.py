"""A language model as explainer and simulator, over any OpenAI-compatible chat endpoint, local servers included (B14, B15).

The procedure is the paper's: one question for the explanation, with examples, interval names and logits; one for all
predictions on the other examples, shuffled and without these; one for the logits. The paper's eight demonstrations were
worked out by hand on features of its own model; here the rules are stated and one invented example is given.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_lib.errors import StudyError
from sae_lib.interpret import Examples, Unanswered

EXPLAIN_PROMPT = """\
You study one unit of a language model: a number computed on every token of a text. Find out what makes it fire.
Each example is some tokens in order, as JSON strings, each with the unit's activation on it from 0 (none) to 9 (its largest).
The unit sees a token and what stands before it, never what follows. Examples are grouped by how strongly the unit fires, then
come random text and places where the strongest tokens stand elsewhere, often without the unit firing: compare them.

Think step by step: on which tokens it fires, what stands before them, what sets them apart from like tokens where it is silent.
Then give one short sentence between <answer> and </answer>. Name the pattern; do not list tokens. If the favoured next tokens
below have something in common, say that too. For instance:
<answer>digits inside a date, after a month's name; the next token is likely a comma or a year</answer>
"""
SIMULATE_PROMPT = """\
A unit of a language model is described so: {text}

Below are {n} snippets of {width} tokens each, as JSON lists. Predict the unit's activation on every token, a whole number from 0
(none) to 9 (strongest). Most tokens of most texts are 0. The unit sees a token and what stands before it, never what follows.
Answer with one line a snippet and nothing else: its number, a colon, {width} numbers with spaces between. If snippets had
nine tokens:
1: 0 0 0 7 9 0 0 0 0
"""
LOGITS_PROMPT = """\
A unit of a language model is described so: {text}

When it fires, it makes some next tokens more likely. Below are {n} numbered tokens, as JSON strings. About half of them are
among those that it makes more likely. Answer with the numbers of these between <answer> and </answer>, with commas between.
"""


class Chat:
    """Questions to the endpoint that OPENAI_BASE_URL names, with the key in OPENAI_API_KEY if the server wants one."""

    def __init__(self, model: str, timeout: int | float = 120, attempts: int = 4, wait: int | float = 2):
        """`timeout` and `wait` are seconds; the wait doubles with every attempt. Raises StudyError if no endpoint is named."""
        self.url = os.environ.get("OPENAI_BASE_URL", "").rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise StudyError("No endpoint is named; set OPENAI_BASE_URL to one such as http://localhost:8000/v1.")
        self.model, self.timeout, self.attempts, self.wait = model, timeout, attempts, wait

    def ask(self, question: str) -> str:
        """The answer at temperature 0. An overloaded or failing server is asked again.

        Raises StudyError if there is no server, it refuses the key or the question, or keeps failing; Unanswered if its
        answer is no chat completion.
        """
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        trouble = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                trouble = f"answers with status {error.code}"
                if error.code in (401, 403):
                    raise StudyError(f"{self.url} refuses the key (status {error.code}); set OPENAI_API_KEY.") from error
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise StudyError(f"{self.url} refuses the question (status {error.code}); check the model's name, "
                                     f"{self.model!r}, and the address.") from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, ConnectionRefusedError):
                    raise StudyError(f"There is no server at {self.url}; start it, or mend OPENAI_BASE_URL.") from error
                trouble = f"cannot be reached ({reason})"
        raise StudyError(f"{self.url} {trouble}, {self.attempts} times; try later or use another server.")


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise Unanswered("The server's answer is no chat completion; check that its address ends in /v1 or the like.") from error
    if not isinstance(content, str) or not content.strip():
        raise Unanswered("The model gave an empty answer; use another model.")
    return content


def _answer(content: str) -> str:
    """What stands in the last pair of answer tags. The paper drops explanations without them too."""
    found = re.findall(r"<answer>(.*?)</answer>", content, flags=re.DOTALL | re.IGNORECASE)
    if not found:
        raise Unanswered("The model's answer has no <answer> tags; use another model, or one with longer answers.")
    return " ".join(found[-1].split())


class EndpointExplanation:
    """A sentence by a language model, which is also asked what follows from it."""

    def __init__(self, text: str, chat: Chat, vocabulary: Sequence[bytes]):
        self.text, self._chat, self._vocabulary = text, chat, vocabulary

    def simulate(self, windows: Int[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
        """The predicted levels, 0-9. A snippet that the answer leaves out counts as 0.

        Raises Unanswered if more than half are left out, and what `Chat.ask` raises.
        """
        lines = [f"{i}: {_tokens(window, self._vocabulary)}" for i, window in enumerate(windows, 1)]
        question = SIMULATE_PROMPT.format(text=self.text, n=len(windows), width=windows.shape[1])
        content = self._chat.ask("\n".join([question, *lines]))
        levels, known = np.zeros(windows.shape), set()
        for number, rest in re.findall(r"^[^\w\n]*(\d+)[^\w\n]*[:.)](.*)$", content, flags=re.MULTILINE):
            values = [float(value) for value in re.findall(r"\d+(?:\.\d+)?", rest)]
            if 1 <= int(number) <= len(windows) and len(values) == windows.shape[1]:
                levels[int(number) - 1] = np.clip(values, 0, 9)
                known.add(int(number))
        if 2 * len(known) < len(windows):
            raise Unanswered(f"The model predicted only {len(known)} of {len(windows)} snippets; use another model.")
        return levels

    def logits(self, tokens: Int[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """The tokens that the model expects to become more likely. Raises Unanswered and what `Chat.ask` raises."""
        lines = [f"{i}: {_quoted(token, self._vocabulary)}" for i, token in enumerate(tokens.tolist(), 1)]
        answer = _answer(self._chat.ask("\n".join([LOGITS_PROMPT.format(text=self.text, n=len(tokens)), *lines])))
        return np.isin(np.arange(1, len(tokens) + 1), [int(number) for number in re.findall(r"\d+", answer)])


class EndpointExplainer:
    """Explains units by asking a language model."""

    def __init__(self, vocabulary: Sequence[bytes], model: str, **options: int | float):
        """`options` are those of `Chat`: timeout, attempts, wait. Raises StudyError if no endpoint is named."""
        self._vocabulary, self._chat = vocabulary, Chat(model, **options)

    def explain(self, examples: Examples, top_logits: Int[np.ndarray, " top"],
                bottom_logits: Int[np.ndarray, " bottom"]) -> EndpointExplanation:
        """The model's sentence. Raises Unanswered if its answer has none, and what `Chat.ask` raises."""
        parts = [EXPLAIN_PROMPT]
        for source in dict.fromkeys(examples.source):
            parts.append(f"\n{source}:")
            for tokens, levels, name in zip(examples.tokens, examples.levels, examples.source, strict=True):
                if name == source:
                    pairs = zip(tokens.tolist(), levels, strict=True)
                    parts.append("  ".join(f"{_quoted(token, self._vocabulary)} {level}" for token, level in pairs))
        for name, tokens in (("favoured", top_logits), ("disfavoured", bottom_logits)):
            if len(tokens):
                parts.append(f"\nMost {name} next tokens: {_tokens(tokens, self._vocabulary)}")
        text = _answer(self._chat.ask("\n".join(parts)))
        if not text:
            raise Unanswered("The model's explanation is empty; use another model.")
        return EndpointExplanation(text, self._chat, self._vocabulary)


def _quoted(token: int, vocabulary: Sequence[bytes]) -> str:
    return json.dumps(vocabulary[token].decode("utf-8", errors="replace"), ensure_ascii=False)


def _tokens(tokens: Int[np.ndarray, " n"], vocabulary: Sequence[bytes]) -> str:
    return f"[{', '.join(_quoted(token, vocabulary) for token in tokens.tolist())}]"
