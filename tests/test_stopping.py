"""Ends of texts: stop tokens, and stop strings in text that arrives in pieces."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xalign.stopping import StopStrings, StopTokens, Utf8Stream


def run(pieces, stops):
    cutter = StopStrings(stops)
    shown = [cutter.push(p) for p in pieces]
    return "".join(shown) + cutter.flush(), cutter.stopped, shown


def test_stop_straddles_pieces():
    text, stopped, shown = run(["Hello <", "/", "s", "> and more"], ["</s>"])
    assert (text, stopped) == ("Hello ", "</s>")
    assert shown == ["Hello ", "", "", ""]


def test_what_only_looked_like_a_stop_is_shown_as_soon_as_it_can_be():
    text, stopped, shown = run(["a<", "/b", "</"], ["</s>"])
    assert (text, stopped) == ("a</b</", None)
    assert shown == ["a", "</b", ""]


def test_nothing_comes_after_a_stop():
    cutter = StopStrings(["."])
    assert cutter.push("one. two") == "one"
    assert cutter.push("three") == "" and cutter.flush() == ""
    assert cutter.stopped == "."


def test_a_false_start_inside_a_stop_is_no_loss():
    assert run("aaab", ["aab"])[:2] == ("a", "aab")
    assert run("ababac!", ["abac"])[:2] == ("ab", "abac")


@pytest.mark.parametrize("text, stops, expected", [
    ("xabcy", ["bc", "abc"], ("x", "abc")),  # complete at once: the longer one
    ("xabcd", ["bc", "abcd"], ("xa", "bc")),  # complete first
    ("ab", ["a", "ab"], ("", "a")),
    ("abcabc", ["c"], ("ab", "c")),
    ("", ["c"], ("", None)),
    ("text", [], ("text", None)),
])
def test_overlapping_stops(text, stops, expected):
    assert run([text], stops)[:2] == expected
    assert run(text, stops)[:2] == expected


@pytest.mark.parametrize("stops", ["</s>", [""], [3], ["a", None]])
def test_bad_stops(stops):
    with pytest.raises(ValueError, match="non-empty strings"):
        StopStrings(stops)


@given(st.text("ab<", max_size=24), st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4),
       st.lists(st.integers(0, 24), max_size=8))
def test_pieces_make_no_difference(text, stops, cuts):
    cuts = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    whole = run([text], stops)[:2]
    assert run(pieces, stops)[:2] == whole == run(text, stops)[:2]
    # the definition: the first end of any stop; of those that end there the longest
    ends = [(i, -len(s), s) for i in range(len(text) + 1) for s in stops if text[:i].endswith(s)]
    assert whole == ((text[: min(ends)[0] + min(ends)[1]], min(ends)[2]) if ends else (text, None))


@given(st.text("ab<", max_size=16), st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_part_of_a_stop_is_ever_shown_and_nothing_is_held_longer_than_needed(text, stops):
    cutter, seen, shown = StopStrings(stops), "", ""
    for letter in text:
        seen, shown = seen + letter, shown + cutter.push(letter)
        if cutter.stopped:
            break
        begun = max(k for s in stops for k in range(len(s)) if seen.endswith(s[:k]))
        assert shown == seen[: len(seen) - begun]


def lengths(*values):
    return torch.tensor(values)


def test_stop_tokens():
    stops = StopTokens([7, 9], [[1, 2], [3]], torch.device("cpu"))
    rows = torch.tensor([[1, 2], [2, 1], [0, 7], [9, 0], [5, 3], [0, 9]])
    assert stops.hits(rows, lengths(*[2] * 6), lengths(*[0] * 6)).tolist() == [True, False, True, False, True, True]
    # the first token is the prompt's: a sequence that begins in it is none
    assert stops.hits(rows, lengths(*[2] * 6), lengths(*[1] * 6)).tolist() == [False, False, True, False, True, True]
    assert not stops.hits(rows, lengths(*[2] * 6), lengths(*[2] * 6)).any(), "nothing was generated yet"


def test_stops_are_looked_for_at_each_rows_own_end():
    stops = StopTokens(7, [[1, 2]], torch.device("cpu"))
    text = torch.tensor([[7, 1, 2, 5], [0, 1, 2, 7], [1, 2, 7, 0], [1, 2, 7, -5]])
    assert stops.hits(text, lengths(3, 4, 2, 1), lengths(0, 1, 0, 0)).tolist() == [True, True, True, False]


ROWS = st.integers(1, 6).flatmap(lambda w: st.tuples(st.lists(st.integers(0, 2), min_size=w, max_size=w), st.just(w)))


@given(ROWS, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 2), max_size=2),
       st.data())
def test_stop_tokens_are_their_definition(row, sequences, eos, data):
    text, w = row
    n = data.draw(st.integers(1, w))
    prompt = data.draw(st.integers(0, n))
    hits = StopTokens(eos, sequences, torch.device("cpu")).hits(torch.tensor([text]), lengths(n), lengths(prompt))
    written = text[prompt:n]
    assert hits.tolist() == [any(written[-len(s) :] == s for s in [*sequences, *([e] for e in eos)])]


@pytest.mark.parametrize("eos, expected", [(None, 0), ([], 0), (0, 1), ((3, 4), 2), (torch.tensor(3), 1),
                                           (torch.tensor([3, 4]), 2)])
def test_end_tokens_are_none_one_or_several(eos, expected):
    stops = StopTokens(eos, None, torch.device("cpu"))
    assert len(stops.eos) == expected and bool(stops) == bool(expected)


def test_an_empty_stop_sequence_is_refused():
    with pytest.raises(ValueError, match="empty sequence"):
        StopTokens(None, [[1], []], torch.device("cpu"))


@given(st.text(max_size=12), st.integers(1, 5))
def test_utf8_in_pieces(text, size):
    data, stream = text.encode("utf-8", "replace"), Utf8Stream()
    shown = [stream.push(data[i : i + size]) for i in range(0, len(data), size)]
    assert "".join(shown) + stream.flush() == data.decode()
    assert "�" not in "".join(shown) or "�" in text


def test_utf8_holds_back_an_unfinished_character_and_replaces_a_broken_one():
    stream, snow = Utf8Stream(), "☃".encode()
    assert [stream.push(snow[:2]), stream.push(snow[2:])] == ["", "☃"]
    assert stream.push(snow[:1]) == "" and stream.flush() == "�"
    assert Utf8Stream().push(b"\xff!") == "�!"
