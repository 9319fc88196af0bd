"""Names on a terminal, and names of results."""

from __future__ import annotations

import pytest

from querydet_jax.runtime.names import printable, result_stems


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jx.png", "\\x1b[2Jx.png"),  # would clear the terminal
        ("a\rb", "a\\rb"),
        ("\x9b31m", "\\x9b31m"),  # an escape sequence in one character
        ("gpj.\u202egnp", "gpj.\\u202egnp"),  # would be shown backwards
        ("\udcff.png", "\\udcff.png"),  # a byte that is no UTF-8
        ("line 1\n\tline 2", "line 1\n\tline 2"),
        ("Müller 鳥 🐦.png", "Müller 鳥 🐦.png"),
    ],
)
def test_a_terminal_sees_no_control_characters(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("paths", "stems"),
    [
        (["a.png", "b.jpg"], ["a", "b"]),
        (["cam1/0001.png", "cam2/0001.png", "cam2/0002.png"], ["cam1_0001", "cam2_0001", "0002"]),
        (["x/cam1/0001.png", "y/cam1/0001.png"], ["x_cam1_0001", "y_cam1_0001"]),
        (["a.png", "a.jpg"], ["a_png", "a_jpg"]),
        (["a.png", "A.png"], ["a_png", "A_png_2"]),
        (["a/b_c.png", "a_b/c.png", "a/c.png"], ["b_c", "a_b_c", "a_c"]),
        (["a\x1b:b.png", "\udcff.png"], ["a__b", "_"]),
        (["same.png", "same.png"], ["same_png", "same_png_2"]),
    ],
)
def test_results_of_different_pictures_have_different_names(paths, stems):
    assert result_stems(paths) == stems


def test_results_avoid_taken_names_and_long_ones():
    assert result_stems(["a.png", "b.png"], taken=["A"]) == ["a_2", "b"]
    long = ["é" * 120 + "1.png", "é" * 120 + "2.png"]
    found = result_stems(long)
    assert len(set(found)) == 2 and all(len(stem.encode()) <= 120 for stem in found)
