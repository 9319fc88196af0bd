"""The compiled detector: same detections whatever the capacities, the batch and the way of computing.

A small network with random weights and generated pictures; what it finds is compared with the dense
network's own maps, taken through the cascade, the decoding and the suppression of `cascade_oracle`.
"""

from __future__ import annotations

import dataclasses
import re

import cascade_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_detector import (
    BASE,
    MODEL,
    REACH,
    assert_matches,
    assert_same,
    counts,
    detector,
    model,
    pictures,
    randomize,
    reference,
    updated,
    with_bias,
    with_query_bias,
)

from querydet_jax import Detections, Detector, build_model
from querydet_jax.config import BackboneConfig, DataConfig, QueryConfig
from querydet_jax.data.readers.pictures import open_pictures
from querydet_jax.inference.results import run_on_images
from querydet_jax.runtime.errors import ConfigError

FOUR = pictures(4, 64, 96)
ON_SITES = {"capacities": (1.0,), "chunk": 64}  # never densely


@pytest.fixture(scope="module")
def csq() -> Detector:
    """The main detector, compiled."""
    detector()(FOUR)
    return detector()


# Against the definition ------------------------------------------------------------------------


def test_csq_finds_what_the_definition_finds(csq):
    result = csq(FOUR)
    expected, expected_counts = reference(model(), FOUR, csq.config)
    assert counts(result) == expected_counts
    assert_matches(result, expected)
    # The example is worth testing: some cells fire on both levels, most do not.
    for level, (queries, _, active) in expected_counts.items():
        assert 0 < queries and active < 0.6 * 4 * (64 // 2**level) * (96 // 2**level)


def test_dense_finds_what_the_definition_finds():
    dense = detector(query="dense")
    result = dense(FOUR)
    assert_matches(result, reference(model(), FOUR, dense.config)[0])
    assert result.stats == {}


@pytest.mark.parametrize(("start_level", "context"), [(3, REACH), (5, 2), (6, 1)])
def test_start_levels(start_level, context):
    """P5 is 3x5 here and P6 2x3: children beyond P5's odd sides are dropped."""
    csq = detector(start_level=start_level, context=context, capacities=(0.25,))
    images = pictures(2, 96, 160, seed=1)
    result = csq(images)
    expected, expected_counts = reference(model(), images, csq.config)
    assert counts(result) == expected_counts
    assert sorted(result.stats) == list(range(2, start_level))
    assert min(min(found) for found in expected_counts.values()) > 0
    assert_matches(result, expected)
    if start_level == 6:
        assert expected_counts[5][1] < 4 * expected_counts[5][0]
    if context == REACH:  # then the heads see at the keys what dense heads see
        assert_matches(result, reference(model(), images, csq.config, context=100)[0])


def test_start_at_p7():
    """P6, too, is sparse then, and is not found a second time; P7 2x2, P6 3x3, P5 5x5."""
    config = dataclasses.replace(BASE, start_level=7, threshold=0.42, capacities=(0.25,))
    images = pictures(2, 160, 160, seed=1)
    result = Detector(model(min_level=5, max_level=7), config)(images)
    expected, expected_counts = reference(model(min_level=5, max_level=7), images, config)
    assert counts(result) == expected_counts
    assert 0 < expected_counts[6][1] < 4 * expected_counts[6][0] and 0 < expected_counts[5][0]
    assert_matches(result, expected)


# What must not matter --------------------------------------------------------------------------


def test_capacities_and_chunk_do_not_matter(csq):
    result = csq(FOUR)
    ran = {level: [int(stats.capacity)] for level, stats in result.stats.items()}
    for changes in (ON_SITES, {"capacities": (0.01,)}):
        other = detector(**changes)(FOUR)
        assert_same(other, result)
        assert counts(other) == counts(result)
        for level, stats in other.stats.items():
            ran[level].append(int(stats.capacity))
            assert bool(stats.overflowed) == (int(stats.capacity) == 0)
    # Not thrice the same computation: each level has run on sites and densely.
    assert all(0 in capacities and max(capacities) > 0 for capacities in ran.values())


def test_a_batch_equals_its_images_one_by_one(csq):
    together = csq(FOUR)
    singles = [csq(FOUR[i : i + 1]) for i in range(4)]
    assert_same(together, jax.tree.map(lambda *parts: jnp.concatenate(parts), *[_without_stats(x) for x in singles]))
    for level, found in counts(together).items():
        apart = [counts(single)[level] for single in singles]
        assert np.sum(apart, axis=0).tolist() == found
        assert apart[0] == [0, 0, 0] and len({queries for queries, _, _ in apart}) > 2  # unequal crowding


def test_a_batch_with_one_crowded_picture(csq):
    """The crowd fills a larger buffer, or runs densely, for all; what the others get stays the same."""
    quiet = pictures(8, 64, 96, seed=1)[3]
    batch = np.stack([np.roll(quiet, 6 * i, axis=1) for i in range(4)])  # no two alike
    batch[2] = pictures(8, 64, 96, seed=3)[6]
    together = csq(batch)
    singles = [csq(batch[i : i + 1]) for i in range(4)]
    assert_same(
        _without_stats(together),
        jax.tree.map(lambda *parts: jnp.concatenate(parts), *[_without_stats(single) for single in singles]),
    )
    crowd = counts(singles[2])[2][2]
    assert crowd > 1.5 * max(counts(single)[2][2] for i, single in enumerate(singles) if i != 2) > 0


def _without_stats(result: Detections) -> Detections:
    return dataclasses.replace(result, stats={})


def test_the_same_picture_gives_the_same_bits(csq):
    first = jax.tree.map(np.asarray, csq(FOUR))
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, csq(FOUR)), first)


def test_padding_does_not_matter(csq):
    """A 50x70 picture by itself equals the same on a canvas beside larger ones."""
    canvas = pictures(4, 64, 96, seed=3)[::-1].copy()  # beyond its size, a picture's canvas holds rubbish
    sizes = np.array([[50, 70], [64, 96], [33, 96], [50, 70]], np.int32)
    result = csq(canvas, sizes)
    alone = detector(**ON_SITES)(canvas[[0, 3], :50, :70])
    assert_same(jax.tree.map(lambda x: x[jnp.array([0, 3])], _without_stats(result)), alone)
    filling = csq(canvas)
    np.testing.assert_allclose(result.scores[1], filling.scores[1], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(result.scores - filling.scores)[[0, 2]]).max(axis=1).min() > 1e-3


# Extremes --------------------------------------------------------------------------------------


def test_without_queries_only_the_upper_levels_detect(csq):
    changed = with_query_bias(-100.0)
    with updated(csq, changed):
        result = csq(FOUR)
    expected, _ = reference(changed, FOUR, csq.config)
    assert_matches(result, expected)
    assert counts(result) == {3: [0, 0, 0], 2: [0, 0, 0]}
    assert not any(bool(stats.overflowed) for stats in result.stats.values())
    assert (csq(FOUR).scores != result.scores).any()  # the fine levels do add something


@pytest.mark.parametrize("changes", [{}, ON_SITES], ids=["dense rung", "on sites"])
def test_when_every_cell_fires_it_is_dense_inference(csq, changes):
    cells = {3: 4 * 8 * 12, 2: 4 * 16 * 24}
    everywhere = detector(**changes)
    everywhere(FOUR)
    with updated(everywhere, with_query_bias(100.0)):
        result = everywhere(FOUR)
    assert {level: found[1:] for level, found in counts(result).items()} == {
        level: [n, n] for level, n in cells.items()
    }
    assert_same(result, detector(query="dense")(FOUR))


def test_nothing_above_the_score_threshold(csq):
    with updated(csq, with_bias(lambda model: model.head.cls_score, -100.0)):
        result = csq(FOUR)
    assert not result.valid.any() and not result.scores.any() and not result.boxes.any()
    assert (result.classes == -1).all()


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_reports_decayed_scores(csq, method):
    hard, soft = csq(FOUR), detector(nms=method, soft_prune=BASE.score_threshold, max_detections=500)(FOUR)
    for b in range(4):
        before, after = np.asarray(hard.valid[b]).sum(), np.asarray(soft.valid[b]).sum()
        scores = np.asarray(soft.scores[b])
        assert after >= before or before == 50  # what hard suppression drops lives on with less
        assert (np.diff(scores) <= 0).all() and (scores[:after] > BASE.score_threshold).all()
        if before:  # the best box meets no better one
            np.testing.assert_allclose(scores[0], hard.scores[b, 0], rtol=1e-6)
            np.testing.assert_allclose(soft.boxes[b, 0], hard.boxes[b, 0], rtol=1e-6)
    assert np.asarray(hard.valid).any()


# The contract ----------------------------------------------------------------------------------


def test_fields(csq):
    for images in (FOUR, FOUR[:1]):
        result = csq(images)
        batch = len(images)
        assert (result.boxes.shape, result.boxes.dtype) == ((batch, 50, 4), jnp.float32)
        assert (result.scores.shape, result.scores.dtype) == ((batch, 50), jnp.float32)
        assert (result.classes.shape, result.classes.dtype) == ((batch, 50), jnp.int32)
        assert (result.valid.shape, result.valid.dtype) == ((batch, 50), jnp.bool_)
        assert sorted(result.stats) == [2, 3]
        for stats in result.stats.values():
            assert [x.dtype for x in stats] == [jnp.int32] * 4 + [jnp.bool_]
            assert all(x.shape == () for x in stats)
        valid, scores, classes = np.asarray(result.valid), np.asarray(result.scores), np.asarray(result.classes)
        assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # the valid ones first
        assert (np.diff(scores, axis=1) <= 0).all()
        assert (scores[valid] > csq.config.score_threshold).all() and not scores[~valid].any()
        assert ((classes[valid] >= 0) & (classes[valid] < 3)).all() and (classes[~valid] == -1).all()
        assert np.isfinite(result.boxes).all() and not np.asarray(result.boxes)[~valid].any()
    assert valid.any() and not valid.all()  # the gray picture alone


def test_one_program_an_input_shape():
    dense = detector(query="dense")
    dense(FOUR)
    count = dense.compilations()
    dense(pictures(4, 64, 96, seed=9))
    dense(jnp.asarray(FOUR), np.array([[10, 20]] * 4))
    assert dense.compilations() == count
    dense(FOUR[:2])
    assert dense.compilations() == count + 1


def test_new_weights_count_only_after_update(csq):
    result = csq(FOUR)
    changed = nnx.clone(model())
    randomize(changed, seed=77)
    with updated(csq, changed):
        other = csq(FOUR)
        assert (other.scores != result.scores).any()
        # The detector has its own copy: training goes on without it.
        changed.head.cls_score.bias[...] = changed.head.cls_score.bias[...] - 1
        np.testing.assert_array_equal(csq(FOUR).scores, other.scores)
    np.testing.assert_array_equal(csq(FOUR).scores, result.scores)


def test_a_model_in_training_stays_so():
    config = dataclasses.replace(MODEL, backbone=BackboneConfig(name="resnet18", norm="batch", width=32))
    trained = build_model(config)
    norm = trained.backbone.res5[0].conv1.norm
    for mode, averages in ((trained.train, False), (trained.eval, True)):
        mode()
        Detector(trained, BASE)
        assert norm.use_running_average is averages


def test_trace_shows_what_the_stats_count(csq):
    trace = csq.trace(FOUR)
    assert sorted(trace.probability) == [3, 4] and sorted(trace.keys) == sorted(trace.active) == [2, 3]
    for level, (queries, keys, active) in counts(csq(FOUR)).items():
        above = np.asarray(trace.probability[level + 1])
        fired = above > csq.config.threshold
        assert above.shape == (4, 64 // 2 ** (level + 1), 96 // 2 ** (level + 1)) and above.dtype == np.float32
        assert fired.sum() == queries
        children = cascade_oracle.children(fired, (64 // 2**level, 96 // 2**level))
        np.testing.assert_array_equal(trace.keys[level], children)
        np.testing.assert_array_equal(trace.active[level], cascade_oracle.squares(children, csq.config.context))
        assert (children.sum(), np.asarray(trace.active[level]).sum()) == (keys, active)
    assert not np.asarray(trace.probability[3])[~np.asarray(trace.keys[3])].any()
    assert (np.asarray(trace.probability[3])[np.asarray(trace.keys[3])] > 0).all()


def test_many_pictures_of_two_canvases_compile_two_programs(csq):
    """Whatever the crowding: every rung, the dense one too, is part of the first program."""
    rng = np.random.default_rng(0)
    canvases = [(64, 96), (96, 64)]
    for canvas in canvases:
        csq(np.zeros((1, *canvas, 3), np.uint8))
    compiled: list[str] = []
    count = csq.compilations()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    rungs = set()
    for i in range(60):
        height, width = canvases[i % 2]
        rows = int(height * rng.random() ** 2)
        picture = np.full((1, height, width, 3), 118, np.uint8)
        picture[0, :rows] = rng.integers(0, 256, (-(-rows // 4), width // 4, 3)).repeat(4, 0).repeat(4, 1)[:rows]
        stats = csq(picture, np.asarray([[height, width]], np.int32)).stats
        rungs |= {(level, int(stat.capacity)) for level, stat in stats.items()}
    assert csq.compilations() == count and not compiled
    assert len(rungs) >= 5  # of 2 x 3 on each canvas


def test_no_map_of_the_finest_level_is_made():
    """Without the dense rung no array has the cells of P2 and the pyramid's or the heads' channels."""
    cells = {(1, 16, 24, 16), (384, 16), (1, 384, 16)}

    def shapes(**changes) -> set[tuple[int, ...]]:
        text = detector(**changes).lower((1, 64, 96)).compile().as_text()
        return {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}

    assert not cells & shapes(overflow="cap")
    assert cells & shapes(query="dense") and cells & shapes()  # they would be seen


@pytest.mark.parametrize("changes", [{"capacities": (0.3, 1.0)}, {"capacities": (0.01,), "overflow": "cap"}])
def test_tiles_find_what_single_cells_find(changes):
    tiled = detector(kernel="tiles", tile=4, chunk=64, **changes)(FOUR)
    plain = detector(**changes if "overflow" in changes else {})(FOUR)
    if not changes.get("overflow"):
        assert_same(_without_stats(tiled), _without_stats(plain))
        assert counts(tiled) == counts(plain)
    else:  # tiles need more room, so fewer queries may fit
        for level, stats in tiled.stats.items():
            assert int(stats.active) <= int(stats.capacity) and int(stats.active) <= int(plain.stats[level].active)
    assert any(int(stats.capacity) > 0 and int(stats.capacity) % 16 == 0 for stats in tiled.stats.values())


def test_rungs_compile_to_branches(csq):
    """One a sparse level. A select would compute every rung for every picture."""
    text = csq.lower((4, 64, 96)).compile().as_text()
    assert text.count(" conditional(") == 2


# Errors ----------------------------------------------------------------------------------------


def test_a_model_without_query_head_is_refused():
    without = build_model(dataclasses.replace(MODEL, query=QueryConfig(enabled=False)))
    with pytest.raises(ConfigError, match="inference.query csq: this model has no query head; use .* dense"):
        Detector(without, BASE)
    Detector(without, dataclasses.replace(BASE, query="dense", start_level=2))


@pytest.mark.parametrize("start_level", [0, 2, 7])
def test_a_start_level_that_is_not_there_is_refused(start_level):
    with pytest.raises(ConfigError, match=rf"inference.start_level {start_level}: the model has P2..P6; choose"):
        Detector(model(), dataclasses.replace(BASE, start_level=start_level))


def test_dense_inference_has_no_trace():
    with pytest.raises(ConfigError, match="inference.query dense computes no queries; use inference.query csq"):
        detector(query="dense").trace(FOUR)


def test_other_query_methods_read_the_same_keys():
    """CCQ is CSQ with all the context a head sees; CQ differs from it only near the border."""
    sparse = jax.device_get(detector(context=REACH)(FOUR))
    complete = jax.device_get(detector(query="ccq")(FOUR))
    crops = jax.device_get(detector(query="cq")(FOUR))
    np.testing.assert_array_equal(complete.classes, sparse.classes)
    np.testing.assert_allclose(complete.scores, sparse.scores, atol=1e-5, rtol=0)
    np.testing.assert_allclose(complete.boxes, sparse.boxes, atol=1e-3, rtol=0)
    for level, stats in complete.stats.items():
        assert stats.keys == sparse.stats[level].keys
    assert crops.stats[3].keys == sparse.stats[3].keys > 0 and crops.valid.any()


def test_hard_cap_reports_the_overflow():
    free = jax.device_get(detector(capacities=(0.01,))(FOUR))
    capped = jax.device_get(detector(capacities=(0.01,), overflow="cap")(FOUR))
    assert free.stats[3].overflowed and capped.stats[3].overflowed
    assert free.stats[3].queries == capped.stats[3].queries
    assert 0 < capped.stats[3].active <= capped.stats[3].capacity < free.stats[3].active


def test_pictures_of_one_pixel_are_read_resized_and_detected_on(tmp_path):
    sizes = {"a": (1, 1), "b": (3000, 1), "c": (1, 3000), "d": (2, 1)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 90, 30)).save(tmp_path / f"{name}.png")
    data = DataConfig(test_short=64, test_max=64, test_canvases=((64, 96),))
    results = list(
        run_on_images(detector(query="dense"), open_pictures([tmp_path], ("a", "b", "c")), data, batch_size=4)
    )
    assert {result.image.shape[1::-1] for result in results} == set(sizes.values())
    for result in results:
        h, w, _ = result.image.shape
        assert np.isfinite(result.boxes).all() and (result.boxes >= 0).all() and (result.boxes <= [w, h, w, h]).all()
