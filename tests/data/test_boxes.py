"""Boxes as text: what is written is read again, and what is no box is refused with its place and values."""

import random

import pytest

from xfusion.data.boxes import Box, boxes_of, reference
from xfusion.data.sequence import XFusionError


def test_a_box_is_written_as_qwen_vl_does():
    box = Box(0.12, 0.34, 0.56, 1.0)
    assert box.text() == "<box>(120,340),(560,999)</box>"  # 1000 is outside [0, 1000)
    assert box.text("red disc") == "<ref>red disc</ref><box>(120,340),(560,999)</box>"
    assert reference(" red disc ") == "<ref>red disc</ref>"


def test_what_is_written_is_read_again_to_a_thousandth():
    rng = random.Random(0)
    for _ in range(200):
        left, top = rng.uniform(0, 0.9), rng.uniform(0, 0.9)
        box = Box(left, top, rng.uniform(left + 0.01, 1), rng.uniform(top + 0.01, 1))
        ((name, found),) = boxes_of(box.text("a thing"))
        assert name == "a thing" and boxes_of(found.text()) == [("", found)]
        for edge in ("left", "top", "right", "bottom"):
            assert 0 <= getattr(box, edge) - getattr(found, edge) <= 0.001 + 1e-6


def test_a_name_holds_for_the_boxes_right_behind_it():
    one, other = "<box>(1,2),(3,4)</box>", "<box> ( 5 , 6 ) , ( 7 , 8 ) </box>"
    text = f"I see <ref>two discs</ref>{one} {other}, and there {one}, no <ref>cat</ref>"
    first, second = Box(0.001, 0.002, 0.003, 0.004), Box(0.005, 0.006, 0.007, 0.008)
    assert boxes_of(text) == [("two discs", first), ("two discs", second), ("", first)]
    assert boxes_of("no box") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<box>(1,2),(3,1000)</box>", "has a coordinate 1000: they go from 0 to 999"),
        ("<box>(5,2),(3,4)</box>", "has no area: the first corner is the upper left"),
        ("<box>(1,2),(3,2)</box>", "has no area"),
        ("<box>(1,2)</box>", "is no box: write"),
        ("<box>(-1,2),(3,4)</box>", "is no box: write"),
        ("<box>(0.1,0.2),(0.3,0.4)</box>", "in whole numbers"),
        ("<box>(１,2),(3,4)</box>", "in whole numbers"),
        ("red <box>(1,2),(3,4)", "<box> stands alone at character 4"),
        ("<ref>disc<box>(1,2),(3,4)</box>", "<ref> stands alone at character 0"),
        ("(1,2),(3,4)</box>", "</box> stands alone"),
    ],
)
def test_what_is_no_box_is_refused(text, message):
    with pytest.raises(XFusionError, match=message):
        boxes_of(text)


def test_boxes_of_the_middle_square():
    """Of a picture of 300 x 100 a model sees what stands between 100 and 200 pixels."""
    box = Box.of_pixels(90, 20, 150, 60, (300, 100))
    assert box == Box(0.0, 0.2, 0.5, 0.6) and box.pixels((300, 100)) == (100, 20, 150, 60)
    assert Box.of_pixels(0, 0, 100, 300, (100, 300)) == Box(0, 0, 1, 1)
    with pytest.raises(XFusionError, match="no area in the middle square of a picture of 300 x 100 pixels"):
        Box.of_pixels(10, 20, 90, 60, (300, 100))


def test_impossible_boxes_and_names_are_refused():
    for edges in ((0.5, 0, 0.5, 1), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, 0, float("nan"), 1)):
        with pytest.raises(XFusionError, match="within 0 to 1"):
            Box(*edges)
    with pytest.raises(XFusionError, match="thinner than a thousandth"):
        Box(0.5, 0.1, 0.5001, 0.2).text()
    for name in (" ", "a <b>"):
        with pytest.raises(XFusionError, match="cannot be the name of a box"):
            Box(0, 0, 1, 1).text(name)
