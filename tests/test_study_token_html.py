from sae_lib.study.token_html import line_html, pieces, token_html


def test_a_letter_in_pieces_is_shown_where_it_ends():
    assert pieces([b"a", b"\xd7", b"\x90", b" \xd7", b"\x91b"]) == ["a", "·", "א", " ", "בb"]
    assert pieces([b"\x90", b"x"]) == ["\ufffd", "x"]


def test_tokens_are_escaped_and_their_breaks_visible():
    shown = token_html("<b>\n\t", title='"quoted"')
    assert shown == '<span style="unicode-bidi: isolate" title="&quot;quoted&quot;">&lt;b&gt;↵→</span>'


def test_strength_darkens_and_above_a_half_is_bold():
    weak, strong = token_html("a", 0.5), token_html("a", 0.51, "color: red")
    assert "rgba(255, 150, 40, 0.50)" in weak and "bold" not in weak
    assert "0.51)" in strong and "font-weight: bold; color: red" in strong


def test_a_line_keeps_spaces_and_direction():
    assert line_html(["x", "y"]) == '<div dir="ltr" style="white-space: pre">xy</div>'
