"""Stop strings in pieces of text."""

from hypothesis import given
from hypothesis import strategies as st

from server.stops import StopScanner

letters = st.text("ab", max_size=12)


def scan(pieces: list[str], stops: list[str], keep_stop: bool = False) -> tuple[list[str], str | None]:
    scanner = StopScanner(stops, keep_stop)
    shown = []
    for piece in pieces:
        shown.append(scanner.push(piece))
        if scanner.found is not None:
            return shown, scanner.found
    return [*shown, scanner.flush()], None


@given(text=letters, stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data())
def test_the_cut_does_not_depend_on_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """Bug: a stop string is found in one stream and missed, or cut elsewhere, in another with the same text."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, found = scan(list(text), stops)
    shown, also_found = scan(pieces, stops)
    assert ("".join(shown), also_found) == ("".join(whole), found)
    if found is None:
        assert "".join(shown) == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith("".join(shown) + found)


@given(text=letters, stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    """Bug: the first half of a stop string leaks into the stream before the second half arrives."""
    _, found = scan(list(text), stops)
    shown = "".join(scan(list(text), stops)[0])
    if found is not None:
        assert not any(stop in shown for stop in stops)


def test_text_flows_as_soon_as_it_cannot_begin_a_stop_string() -> None:
    """Bug: a stop string of forty characters delays every stream by forty characters."""
    assert scan(["one ", "EN", "d ", "two EN", "D!"], ["END"]) == (["one ", "", "ENd ", "two ", ""], "END")


def test_first_completed_wins_and_the_longer_of_two() -> None:
    assert scan(["xabcy"], ["abc", "b"]) == (["xa"], "b")
    assert scan(["xabcy"], ["bc", "abc"]) == (["x"], "abc")


def test_stop_string_may_be_kept() -> None:
    assert scan(["one EN", "D two"], ["END"], keep_stop=True) == (["one ", "END"], "END")
