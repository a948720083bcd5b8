"""Stop strings in streamed text."""

from __future__ import annotations

import random

import pytest

from accel.errors import InputError
from accel.runtime.streaming import StopStrings


def _run(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    watcher, text = StopStrings(stop), ""
    for piece in pieces:
        shown, stopped = watcher.push(piece)
        text += shown
        if stopped:
            assert watcher.push("more") == ("", True)
            assert watcher.flush() == ""
            return text, True
    return text + watcher.flush(), False


def test_text_before_the_stop_string_is_kept() -> None:
    assert _run(["END"], ["some text E", "ND and more"]) == ("some text ", True)
    assert _run(["\n\n"], ["a\n", "b\n", "\nc"]) == ("a\nb", True)


def test_possible_beginnings_are_held_back_and_released() -> None:
    watcher = StopStrings(["END"])
    assert watcher.push("the E") == ("the ", False)
    assert watcher.push("N") == ("", False)
    assert watcher.push("E") == ("EN", False)  # the last E may begin another one
    assert watcher.flush() == "E"
    assert watcher.flush() == ""


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopStrings([]).push("text") == ("text", False)


def test_one_string_may_be_given_bare() -> None:
    assert StopStrings("ab").push("xaby") == ("x", True)


def test_the_match_that_ends_first_wins() -> None:
    assert _run(["abcd", "bc"], ["xabcd"]) == ("xa", True)
    assert _run(["abc", "bc"], ["xabcd"]) == ("x", True)  # both end together: the longer one


def test_splitting_does_not_matter() -> None:
    draw = random.Random(1)
    seen = {True: 0, False: 0}
    for _ in range(500):
        text = "".join(draw.choices("aab", k=draw.randrange(12)))
        stop = ["".join(draw.choices("ab", k=draw.randrange(2, 6))) for _ in range(draw.randrange(1, 4))]
        whole = _run(stop, [text])
        assert _run(stop, list(text)) == whole
        assert whole[1] == any(string in text for string in stop)
        seen[whole[1]] += 1
    assert min(seen.values()) > 50


@pytest.mark.parametrize("stop", [[""], ["ok", ""], [3], [None]])
def test_bad_stop_strings_are_refused(stop: list[str]) -> None:
    with pytest.raises(InputError, match="stop string"):
        StopStrings(stop)
