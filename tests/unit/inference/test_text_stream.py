"""Text that comes in pieces is the text of all tokens, up to the first stop text, and is never taken back."""

from hypothesis import given
from hypothesis import strategies as st

from treadle.data.tokenizer import BytesTokenizerConfig
from treadle.inference.text_stream import TextStream

BYTES = BytesTokenizerConfig().build()


@given(text=st.text(alphabet="abé漢🙂", max_size=30), stop=st.lists(st.text(alphabet="abé漢", max_size=3), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    stream = TextStream(BYTES, stop)
    shown = [stream.push(token) for token in BYTES.encode(text)]
    shown.append(stream.end())
    places = [text.find(each) for each in stop if each and each in text]
    # A stop text counts where it is complete first, and from there on the one that begins first.
    ends = [text.find(each) + len(each) for each in stop if each and each in text]
    first = [place for place, end in zip(places, ends, strict=True) if end == min(ends)]
    expected = text[: min(first)] if first else text
    assert "".join(shown) == stream.text == expected
    assert stream.stopped == bool(places)
    assert "\ufffd" not in stream.text


def test_half_a_character_waits_for_its_other_half() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(token) for token in BYTES.encode("aéb")] == ["a", "", "é", "b"]
    half = TextStream(BYTES)
    assert [half.push(token) for token in BYTES.encode("aé")[:-1]] == ["a", ""]
    assert half.end() == ""
