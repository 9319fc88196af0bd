from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFont

from querydet_jax.runtime.errors import DataError
from querydet_jax.viz.draw import (
    contact_sheet,
    display_scale,
    draw_detections,
    draw_heatmap,
    draw_sites,
    save_image,
    sites_caption,
)
from querydet_jax.viz.primitives import ascii_text, class_colour, fill, frame, heat_colours, inner_edge, labels
from querydet_jax.viz.stages import cascade_pictures, overview


def picture(height=1000, width=1000, value=90):
    return np.full((height, width, 3), value, np.uint8)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def brightness(image, y0, y1, x0, x1):
    return float(image[y0:y1, x0:x1].mean())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2000), (2000, 1), (2, 3), (40, 3000)])
def test_every_stage_is_drawn_on_pictures_of_any_size(height, width):
    def cells(level: int) -> np.ndarray:
        return np.ones((-(-height // 2**level), -(-width // 2**level)), bool)

    maps = {level: cells(level) for level in (2, 3)}
    trace = SimpleNamespace(probability={4: cells(4) * 0.5, 3: cells(3) * 0.5}, keys=maps, active=maps)
    result = SimpleNamespace(
        image=picture(height, width), boxes=np.array([[0, 0, width, height]]), classes=np.zeros(1, int),
        scores=np.ones(1), scale=1.0, queries=trace,
    )  # fmt: skip
    drawn = cascade_pictures(result, ["car"], 0.1)
    assert set(drawn) == {"detections", "query_P4", "sites_P3", "query_P3", "sites_P2"}
    assert drawn["detections"].shape[1] == width * display_scale(height, width)
    assert max(drawn["sites_P2"].shape[1], drawn["query_P4"].shape[1]) <= 2400
    assert overview(result.image, drawn).shape[1] <= 2400


@pytest.mark.parametrize(("height", "width", "scale"), [(320, 320, 3), (1080, 1920, 1), (64, 48, 8), (450, 900, 1)])
def test_small_pictures_are_enlarged_by_an_integer(height, width, scale):
    assert display_scale(height, width) == scale
    out = draw_detections(noise(height, width), np.zeros((0, 4)), np.zeros(0))
    assert out.dtype == np.uint8 and out.shape[1:] == (width * scale, 3)
    assert height * scale < out.shape[0] < height * scale + 200
    if scale == 1:
        np.testing.assert_array_equal(out[:height], noise(height, width))


def test_frame_lies_around_the_box_never_on_it():
    image = noise(1000, 1000)
    out = draw_detections(image, [[500, 600, 506, 607]], [0], [0.9], ["car"])
    np.testing.assert_array_equal(out[600:607, 500:506], image[600:607, 500:506])
    assert (out[596:611, 497] != image[596:611, 497]).any() and (out[596:611, 508] != image[596:611, 508]).any()
    assert (out[597, 500:506] == class_colour(0)).all(), "the line above the box"
    assert (out[609, 500:506] == class_colour(0)).all(), "the line below the box"
    np.testing.assert_array_equal(image, noise(1000, 1000), err_msg="the caller's picture was written into")


def test_boxes_follow_the_enlargement():
    out = draw_detections(picture(320, 320), [[100, 200, 110, 210]], [1])
    assert (out[600:630, 300:330] == 90).all()
    # The label is above the box; the line shows below and beside it.
    assert (out[632, 300:330] == class_colour(1)).all() and (out[600:630, 297:299] == class_colour(1)).any()


def test_low_scores_and_boxes_outside_are_not_drawn():
    image = noise(1000, 1000)
    boxes = [[100, 100, 120, 120], [1200, 50, 1300, 90], [-50, 10, -5, 30]]
    out = draw_detections(image, boxes, [0, 0, 0], [0.29, 0.9, 0.9])
    np.testing.assert_array_equal(out[:1000], image)
    for least in (0.2, [0.2, 0.9]):
        out = draw_detections(image, boxes, [0, 0, 0], [0.29, 0.9, 0.9], min_score=least)
        assert (out[:1000] != image).any()
    for classes, least in (([0, 0, 0], [0.3, 0.2]), ([1, 1, 1], [0.2, 0.3])):
        out = draw_detections(image, boxes, classes, [0.29, 0.9, 0.9], min_score=least)
        np.testing.assert_array_equal(out[:1000], image)


def test_box_at_the_edge_shows_all_four_sides():
    out = draw_detections(picture(), [[-20, -20, 1100, 1020]], [0])[:1000]
    for side in (out[0], out[999], out[:, 0], out[:, 999]):
        assert (side == class_colour(0)).all(axis=-1).mean() > 0.8


def test_truth_is_dashed_white():
    out = draw_detections(picture(), [], [], truth=[[300, 400, 380, 480]])[:1000]
    np.testing.assert_array_equal(out[400:480, 300:380], 90)
    row = out[390:400, 300:380]
    bright = (row > 200).all(axis=2).any(axis=0)
    assert 0.3 < bright.mean() < 0.7, "dashes and gaps"
    assert (row < 70).any(), "gaps are dark"


def test_no_boxes_still_gives_a_picture():
    image = noise(600, 900)
    for scores in (None, []):
        np.testing.assert_array_equal(draw_detections(image, [], [], scores)[:600], image)


def test_labels_cover_neither_small_boxes_nor_each_other():
    # Two boxes far apart, then a crowd of tiny boxes that must get no labels.
    apart = np.array([[100, 100, 130, 130], [600, 600, 640, 640]], float)
    crowd = np.array(
        [[300 + 12 * i, 300 + 12 * j, 306 + 12 * i, 306 + 12 * j] for i in range(4) for j in range(4)], float
    )

    def written(boxes):
        canvas = Image.fromarray(picture())
        count = labels(canvas, boxes, [(255, 0, 0)] * len(boxes), ["label"] * len(boxes), 2, 14)
        return count, np.asarray(canvas)

    count, out = written(apart)
    assert count == 2
    for x0, y0, x1, y1 in apart.astype(int):
        np.testing.assert_array_equal(out[y0:y1, x0:x1], 90)
    assert written(crowd)[0] == 0
    # One box above the other: the lower one's label must move away from its top.
    stack = np.array([[100, 100, 130, 130], [100, 134, 130, 164]], float)
    count, out = written(stack)
    assert count == 2
    for x0, y0, x1, y1 in stack.astype(int):
        np.testing.assert_array_equal(out[y0:y1, x0:x1], 90)
    # Side by side, two labels wider than their boxes fill twice the area of one.
    pair = np.array([[100, 100, 130, 130], [134, 100, 164, 130]], float)
    count, out = written(pair)
    assert count == 2
    assert (out != 90).any(axis=2).sum() == 2 * (written(pair[:1])[1] != 90).any(axis=2).sum()


def test_legend_counts_classes_and_wraps():
    few = draw_detections(picture(), [[10, 10, 20, 20]], [0], names=["car"])
    many = draw_detections(picture(), [[10, 10, 20, 20]] * 40, np.arange(40), names=["a rather long name"] * 40)
    assert many.shape[0] > few.shape[0] and many.shape[1] == few.shape[1]
    assert (few[1000:] == class_colour(0)).all(axis=-1).any(), "the swatch"


def test_heat_map_brightens_the_hot_cell_and_no_other():
    heat = np.zeros((10, 20), np.float32)
    heat[2, 15] = 1.0
    out = draw_heatmap(picture(500, 1000), heat, 50, threshold=0.5)
    assert out.dtype == np.uint8 and out.shape[1] == 1000
    hot = brightness(out, 115, 135, 765, 785)
    assert hot > 120
    for y, x in ((2, 4), (7, 15), (0, 15), (2, 19)):
        assert brightness(out, 50 * y + 15, 50 * y + 35, 50 * x + 15, 50 * x + 35) < 60
    assert (out[100, 755:795] == 255).all() and (out[149, 755:795] == 255).all(), "the outline of the query cell"
    assert not (out[60, :] == 255).all(axis=-1).any()


def test_heat_map_is_bilinear_between_cell_centres():
    heat = np.tile(np.linspace(0, 1, 10, dtype=np.float32), (10, 1))
    out = draw_heatmap(picture(1000, 1000, value=0), heat, 100)
    row = out[500, 50:951].astype(float)
    assert (np.diff(row.sum(axis=1)) >= -2).all()
    np.testing.assert_allclose(row[700], heat_colours(7 / 9) * 0.75, atol=1.5)


def test_map_may_reach_into_padding_and_stride_may_be_a_fraction():
    heat = np.zeros((12, 12), np.float32)
    heat[11, 11] = 1.0  # in the padding only
    out = draw_heatmap(picture(1000, 1000), heat, 100)
    assert out[:1000].max() < 60
    # A map of 16 px cells over a picture that the network saw at 0.8 of its size.
    assert draw_heatmap(picture(1000, 1000), np.ones((50, 50), np.float32), 20.0)[:1000].min() > 100
    assert draw_heatmap(picture(1000, 999), np.ones((38, 38), np.float32), 26.31).shape[1] == 999


def test_a_title_adds_a_strip():
    heat = np.zeros((10, 10), np.float32)
    plain, titled = draw_heatmap(picture(), heat, 100), draw_heatmap(picture(), heat, 100, title="P4")
    extra = titled.shape[0] - plain.shape[0]
    assert extra > 10 and titled[:extra].max() > 150
    np.testing.assert_array_equal(titled[extra:], plain)


def test_sites_tint_keys_and_active_cells_and_darken_the_rest():
    active, keys = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    active[3:6, 6:9] = True
    keys[4, 7] = True
    out = draw_sites(picture(), active, keys, 100).astype(int)
    key, context, rest = out[450, 750], out[350, 750], out[750, 350]
    assert key[0] > 90 > key[2], "keys lean to orange"
    assert context[2] > 90 > context[0], "active cells lean to blue"
    np.testing.assert_allclose(rest, 90 * 0.35, atol=1)
    np.testing.assert_allclose(out[350, 950], 90 * 0.35, atol=1)


def test_sites_caption_counts():
    active, keys = np.zeros((20, 50), bool), np.zeros((20, 50), bool)
    keys[0, :25] = True
    active[:3] = True
    assert sites_caption(active, keys) == ("keys: 25 (2.5 %)", "active: 150 (15.0 %)", "of 1,000 cells")
    with pytest.raises(DataError, match="bool maps"):
        sites_caption(active.astype(int), keys)


def test_contact_sheet_lays_panels_in_rows():
    panels = [("red", picture(100, 200)), ("", picture(50, 100, 200)), ("last", picture(100, 200, 10))]
    sheet = contact_sheet(panels, 2)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 2 * 200 + 3 * 12
    assert sheet.shape[0] > 2 * 100
    # The second panel, enlarged to the common width, on the right of the first row.
    assert (sheet[12:112, 224:424] == 200).all()
    assert contact_sheet(panels, 3, max_width=300).shape[1] <= 300
    assert contact_sheet(panels[:1], 5).shape[1] == 200 + 2 * 12
    with pytest.raises(DataError, match="contact_sheet"):
        contact_sheet([], 2)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.JPEG", "JPEG")])
def test_saved_pictures_read_back(tmp_path, name, kind):
    image = picture(40, 60)
    image[:20] = 200
    path = tmp_path / "new" / name
    save_image(path, image)
    with Image.open(path) as back:
        assert back.format == kind
        np.testing.assert_allclose(np.asarray(back).astype(int), image, atol=0 if kind == "PNG" else 12)
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(path, picture(10, 10))
    before = path.read_bytes()

    def fails(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_image(path, picture(20, 20))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_detections(np.zeros((9, 9), np.uint8), [], []), "grey picture"),
        (lambda: draw_detections(np.zeros((9, 9, 3), np.float32), [], []), "image: float32"),
        (lambda: draw_detections(picture(), np.zeros((2, 5)), [0, 0]), "boxes: shape"),
        (lambda: draw_detections(picture(), [[0, 0, np.nan, 1]], [0]), "boxes: shape"),
        (lambda: draw_detections(picture(), np.zeros((2, 4)), [0]), "classes: shape"),
        (lambda: draw_detections(picture(), np.zeros((2, 4)), [0, 0], [0.5]), "scores: shape"),
        (lambda: draw_heatmap(picture(), np.zeros((10, 9)), 100), "do not cover"),
        (lambda: draw_heatmap(picture(), np.full((10, 10), 3.0), 100), "sigmoid"),
        (lambda: draw_heatmap(picture(), np.full((10, 10), np.nan), 100), "sigmoid"),
        (lambda: draw_heatmap(picture(), np.zeros((1, 10, 10)), 100), "probability: shape"),
        (lambda: draw_sites(picture(), np.zeros((10, 10), bool), np.zeros((20, 20), bool), 100), "active bool"),
        (lambda: save_image("picture.gif", picture()), "picture.gif"),
        (lambda: save_image("picture.png", np.zeros((4, 4), np.uint8)), "picture.png"),
    ],
)
def test_bad_input_is_named_in_one_line(call, message):
    with pytest.raises(DataError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_fill_covers_fractions_exactly():
    canvas = np.zeros((4, 4, 3), np.uint8)
    fill(canvas, (0.5, 1, 2.25, 2), (200, 100, 40))
    np.testing.assert_array_equal(canvas[1, :, 0], [100, 200, 50, 0])
    assert canvas[[0, 2, 3]].max() == 0
    fill(canvas, (-5, -5, -1, -1), (255, 255, 255))
    fill(canvas, (9, 9, 12, 12), (255, 255, 255))
    assert canvas[0].max() == 0 and canvas[3].max() == 0


def test_frame_outside_the_canvas_paints_nothing():
    canvas = picture(20, 20)
    frame(canvas, (30, 5, 40, 9), 1, 2, (255, 0, 0))
    np.testing.assert_array_equal(canvas, picture(20, 20))


def test_heat_colours_rise_in_lightness():
    colours = heat_colours(np.linspace(0, 1, 101)) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(luminance) - 16
    steps = np.diff(lightness)
    assert (steps > 0).all() and steps.max() < 4 * np.median(steps)


def test_first_fourteen_class_colours_differ_and_avoid_white():
    colours = np.array([class_colour(k) for k in range(14)])
    assert len(np.unique(colours, axis=0)) == 14
    assert class_colour(14) == class_colour(0)
    assert (colours.min(axis=1) < 235).all()


def test_inner_edge():
    mask = np.zeros((9, 9), bool)
    mask[2:7, 4:] = True
    edge = inner_edge(mask, 1)
    assert edge.sum() == 5 + 2 * 4 and not edge[3:6, 5:].any(), "no edge along the rim of the picture"


def test_text_is_reduced_to_the_fonts_letters():
    assert ascii_text("café 車 <8 px") == "cafe ? <8 px"
    font = ImageFont.load_default(size=20)
    missing = font.getmask("\uffff").getbbox()
    assert all(font.getmask(c).getbbox() != missing for c in "ge>=%:,")
