import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from sae_lib.endpoint import Chat, EndpointExplainer
from sae_lib.errors import StudyError
from sae_lib.interpret import Examples, Unanswered

VOCABULARY = [b"<end>", b" the", b"\xd8", b'"', b"\n", "é".encode()]
QUICK = {"timeout": 5, "attempts": 3, "wait": 0.01}


def completion(content):
    return 200, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.fixture
def server(monkeypatch):
    """A chat endpoint that gives `answers`, (status, body), one after another, and keeps what it was `asked`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.asked.append((self.path, self.headers.get("Authorization"), json.loads(body)))
            status, answer = self.server.answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked = [], []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def examples():
    tokens = np.arange(18).reshape(2, 9) % 6
    return Examples(tokens, tokens + 3, np.zeros(2, int), ["Top Activations", "random"], np.ones(2))


def explanation(server, examples, text="<answer>articles</answer>"):
    server.answers.insert(0, completion(text))
    return EndpointExplainer(VOCABULARY, "small", **QUICK).explain(examples, np.array([1, 2]), np.array([3]))


def test_the_question_holds_examples_levels_logits_and_key(server, examples):
    assert explanation(server, examples, "I think.\n<answer>\n articles\n</answer>").text == "articles"
    (path, key, body), = server.asked
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer abc", "small", 0)
    question = body["messages"][0]["content"]
    for part in ("Top Activations:", "random:", '" the" 4', '"\\"" 6', '"\\n" 7', '"é" 8', 'favoured next tokens: [" the"'):
        assert part in question


def test_predictions_are_read_from_untidy_answers(server, examples):
    found = explanation(server, examples)
    answer = "Sure!\n```\n**2:** 0, 1, 2, 3, 4, 5, 6, 7, 12\n 1. [0 0 0 0 0 0 0 0 9]\n3: 1 1 1 1 1 1 1 1 1\n```"
    server.answers = [completion(answer)]
    assert found.simulate(examples.tokens).tolist() == [[0] * 8 + [9], [0, 1, 2, 3, 4, 5, 6, 7, 9]]
    question = server.asked[-1][2]["messages"][0]["content"]
    assert "described so: articles" in question and "random" not in question and "favoured" not in question


def test_a_missing_snippet_counts_as_silent_and_most_missing_is_no_answer(server, examples):
    found = explanation(server, examples)
    server.answers = [completion("1: 1 2 3 4 5 6 7 8 9\n2: 1 2 3"), completion("I cannot say: 1 2 3")]
    assert found.simulate(examples.tokens)[1].tolist() == [0] * 9
    with pytest.raises(Unanswered, match="0 of 2"):
        found.simulate(examples.tokens)


def test_logits_by_number(server, examples):
    found = explanation(server, examples)
    server.answers = [completion("<answer>1, 3, 99</answer>"), completion("<answer></answer>")]
    assert found.logits(np.array([5, 4, 1])).tolist() == [True, False, True]
    assert found.logits(np.array([5, 4, 1])).tolist() == [False] * 3


@pytest.mark.parametrize("answer, reason", [
    ((200, b"<html>"), "no chat completion"),
    ((200, b'{"choices": []}'), "no chat completion"),
    (completion(None), "empty"),
    (completion("It fires on articles."), "no <answer> tags"),
    (completion("<answer> </answer>"), "explanation is empty"),
])
def test_malformed_answers(server, examples, answer, reason):
    server.answers = [answer]
    with pytest.raises(Unanswered, match=reason):
        EndpointExplainer(VOCABULARY, "small", **QUICK).explain(examples, np.array([1]), np.array([2]))


def test_a_failing_server_is_asked_again_and_not_for_ever(server):
    server.answers = [(500, b""), (429, b""), completion("yes")]
    assert Chat("small", **QUICK).ask("?") == "yes"
    server.answers = [(503, b"")] * 3
    with pytest.raises(StudyError, match="status 503, 3 times"):
        Chat("small", **QUICK).ask("?")
    assert len(server.asked) == 6


@pytest.mark.parametrize("status, reason", [(401, "refuses the key"), (404, "refuses the question")])
def test_refusals_are_final(server, status, reason):
    server.answers = [(status, b"no")]
    with pytest.raises(StudyError, match=reason):
        Chat("small", **QUICK).ask("?")
    assert len(server.asked) == 1


def test_no_server_no_address_and_no_key(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server.answers = [completion("yes")]
    assert Chat("small", **QUICK).ask("?") == "yes" and server.asked[0][1] is None
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(StudyError, match="no server"):
        Chat("small", **QUICK).ask("?")
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(StudyError, match="OPENAI_BASE_URL"):
        Chat("small")
