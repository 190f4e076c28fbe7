import numpy as np
import pytest

from gplws.tiling import tiles

LAYOUTS = [
    # height, width, pixels, reach, alignment
    (480, 640, 10**9, 20, 8),
    (480, 640, 50_000, 20, 8),
    (481, 643, 50_000, 21, 8),
    (480, 640, 50_000, 0, 1),
    (1000, 64, 8000, 20, 8),
    (64, 1000, 8000, 20, 8),
    (30, 2000, 1, 20, 8),
    (540, 960, 86_000, 107, 8),
    (295, 2650, 50_000, 5, 8),
    (7, 5, 1, 3, 1),
    (1, 1, 1, 0, 1),
]


@pytest.mark.parametrize(("height", "width", "pixels", "reach", "alignment"), LAYOUTS)
def test_tiles_give_each_pixel_once_and_see_all_within_reach(
    height, width, pixels, reach, alignment
):
    given = np.zeros((height, width), int)
    for tile in tiles(height, width, pixels, reach, alignment):
        given[tile.given] += 1
        assert tile.rows.size > 0 and tile.columns.size > 0
        for span, length in ((tile.rows, height), (tile.columns, width)):
            assert span.seen.start == max(span.seen.start, 0)
            assert span.seen.start <= max(span.given.start - reach, 0)
            assert span.seen.stop >= min(span.given.stop + reach, length)
            assert span.seen.start % alignment == 0
        seen = np.arange(height * width).reshape(height, width)[tile.seen]
        whole = np.arange(height * width).reshape(height, width)[tile.given]
        assert np.array_equal(seen[tile.inner], whole)
    assert (given == 1).all()


def test_tiles_keep_the_memory_and_are_as_few_as_it_allows():
    found = tiles(1000, 800, 100_000, 10, 8)
    areas = [tile.rows.size * tile.columns.size for tile in found]
    assert max(areas) <= 100_000
    assert sum(areas) < 1.25 * 1000 * 800


def test_an_image_that_fits_is_one_tile():
    (tile,) = tiles(100, 200, 20_000, 10)
    assert tile.given == tile.seen == tile.inner == (slice(0, 100), slice(0, 200))


def test_without_a_known_reach_the_image_is_one_tile():
    (tile,) = tiles(100, 200, 1, None)
    assert tile.seen == (slice(0, 100), slice(0, 200))


def test_where_overlap_would_be_nearly_all_work_tiles_take_more_memory():
    found = tiles(2000, 2000, 300 * 300, 100, 8)
    areas = [tile.rows.size * tile.columns.size for tile in found]
    assert 300 * 300 < max(areas) <= 450 * 450
    assert sum(areas) < 4 * 2000 * 2000
