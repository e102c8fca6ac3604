import numpy as np
import pandas as pd
import pytest

from sae_lib.study.diagrams import NODE, Drawn, arrow, automata_figure, layout, marked_html, spelled, stay_figure, token_list

NAN = np.nan
RATES = {"automaton": "a & b", "stay": 0.6, "low": 0.5, "high": 0.8, "control": 0.2, "control_low": 0.1, "control_high": 0.25,
         "text_stay": 0.7, "document_rate": 0.3, "base_rate": 0.01}


def test_tokens_of_a_label_are_escaped_and_cut_to_the_width():
    tokens = [b"<b>", b"&", b"\xd8", "س".encode()]
    assert token_list(tokens) == "\u2068'&lt;b&gt;'\u2069 \u2068'&amp;'\u2069 \u2068b'\\xd8'\u2069 \u2068'س'\u2069"
    assert token_list([b"$x$"]) == "\u2068'&#36;x&#36;'\u2069"
    assert token_list(tokens, width=10) == token_list(tokens[:2])
    assert token_list([b"a long one"], width=3) == "\u2068'a long one'\u2069"


@pytest.mark.parametrize(("token", "expected"), [
    (b" the\n", "' the\\n'"), ("سя→".encode(), "'سя→'"), (b"\xd8", "b'\\xd8'"), ("\ue000".encode(), "'‹U+e000›'"),
    (" கா".encode(), "' ‹Tamil ka›‹Tamil sign aa›'"), ("中한".encode(), "'‹Cjk 4e2d›‹Hangul han›'"),
])
def test_letters_that_a_font_may_lack_are_named(token, expected):
    assert spelled(token) == expected


def test_pictures_name_letters_where_pages_show_them():
    tamil = "க".encode()
    fig = automata_figure([Drawn("one", (7,), [[tamil]], np.array([[0.5]]))])
    assert fig.layout.annotations[-1].text == "<b>1</b> \u2068'‹Tamil ka›'\u2069"
    assert token_list([tamil]) == "\u2068'க'\u2069"


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_nodes_do_not_overlap(n):
    nodes = layout(n)
    assert nodes.shape == (n, 2)
    apart = np.linalg.norm(nodes[:, None] - nodes, axis=-1)[~np.eye(n, dtype=bool)]
    assert (apart > 4 * NODE).all()


def test_arrows_run_from_rim_to_rim_and_there_and_back_apart():
    one, two = layout(2)
    there, back = arrow(one, two), arrow(two, one)
    assert np.linalg.norm(there[0] - one) == pytest.approx(NODE, abs=0.05)
    assert np.linalg.norm(there[-1] - two) == pytest.approx(NODE + 0.03, abs=0.05)
    assert np.abs(there[len(there) // 2, 1] - back[len(back) // 2, 1]) > 0.3
    loop = arrow(one, one)
    assert (np.linalg.norm(loop - one, axis=1) > NODE).all()
    assert loop[:, 0].min() < one[0] - 0.7  # away from the other node
    assert arrow(np.zeros(2), np.zeros(2))[:, 1].max() > 0.7
    assert np.linalg.norm(loop[0] - loop[-1]) < 2.5 * NODE


def test_an_automaton_has_an_arrow_an_edge_and_a_key():
    share = np.array([[0.5, 0.25], [1.0, NAN]])
    fig = automata_figure([Drawn("<tags>", (7, 9), [[b"<"], [b">"]], share)])
    arrows = [trace for trace in fig.data if trace.mode == "lines+markers"]
    assert [trace.hovertext for trace in arrows] == ["feature 7 → 7: 50%", "feature 7 → 9: 25%", "feature 9 → 7: 100%"]
    texts = [note.text for note in fig.layout.annotations]
    assert texts[0] == "&lt;tags&gt;"
    assert texts[-1] == "<b>1</b> \u2068'&lt;'\u2069<br><b>2</b> \u2068'&gt;'\u2069"


def test_no_automata_make_a_figure_that_says_so():
    for fig in automata_figure([]), stay_figure(pd.DataFrame([RATES]).head(0)):
        assert "no automaton" in fig.data[-1].text[0]


def test_intervals_stand_around_their_rates():
    automaton, control, *marks = stay_figure(pd.DataFrame([RATES])).data
    assert (automaton.error_x.array[0], automaton.error_x.arrayminus[0]) == pytest.approx((0.2, 0.1))
    assert (control.error_x.array[0], control.error_x.arrayminus[0]) == pytest.approx((0.05, 0.1))
    assert [mark.x[0] for mark in marks] == [0.7, 0.3, 0.01]


def test_states_are_marked_in_text():
    page = marked_html([b"a<", b"\n", b"c"], np.array([[True, False], [False, False], [True, True]]), 1)
    spans = page.split("<span ")[1:]
    assert "#777777" in spans[0] and "a&lt;</span><sub>1</sub>" in spans[0]
    assert "border" not in spans[1] and "↵" in spans[1] and "<sub>" not in spans[1]
    assert "c</span><sub>1,2</sub>" in spans[2] and "#777777" not in spans[2]
