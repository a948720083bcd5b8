from __future__ import annotations

import pytest

from accel.inspection.treemap import Box, squarify

PLACE = Box(10, 20, 600, 400)


@pytest.mark.parametrize("sizes", [[6, 6, 4, 3, 2, 2, 1], [1], [5, 5], [1e9, 1, 1e-3], list(range(60, 0, -1))])
def test_areas_are_in_proportion_and_fill_the_box(sizes: list[float]) -> None:
    boxes = squarify(sizes, PLACE)
    for size, box in zip(sizes, boxes, strict=True):
        assert box.width * box.height == pytest.approx(600 * 400 * size / sum(sizes), rel=1e-6)
        assert box.x >= 10 - 1e-6 and box.x + box.width <= 610 + 1e-6
        assert box.y >= 20 - 1e-6 and box.y + box.height <= 420 + 1e-6


def test_boxes_do_not_overlap() -> None:
    boxes = squarify([6, 6, 4, 3, 2, 2, 1], PLACE)
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            apart_x = a.x + a.width <= b.x + 1e-9 or b.x + b.width <= a.x + 1e-9
            apart_y = a.y + a.height <= b.y + 1e-9 or b.y + b.height <= a.y + 1e-9
            assert apart_x or apart_y


def test_boxes_are_near_squares() -> None:
    boxes = squarify([6, 6, 4, 3, 2, 2, 1], Box(0, 0, 6, 4))  # the example of the method's authors
    assert max(max(box.width / box.height, box.height / box.width) for box in boxes) < 3


def test_nothing_to_show() -> None:
    assert squarify([], PLACE) == []
    assert [box.width for box in squarify([0, 0], PLACE)] == [0, 0]
    assert len(squarify([3, 0, 0], PLACE)) == 3
    assert len(squarify([3, 1], Box(0, 0, 0, 0))) == 2
