"""Names and layouts: the official table, and other projects' names of the same tensors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from flax import nnx

from querydet_jax.config import BackboneConfig, FPNConfig, HeadConfig, ModelConfig, QueryConfig
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import WeightsError
from querydet_jax.weights.names import (
    from_torch_layout,
    naming_style,
    official_name,
    to_torch_layout,
    torch_name,
    torch_shape,
)


def published_shapes(num_classes: int, query: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ResNet-50 checkpoint of the published code (317 for QueryDet, 303 for its
    RetinaNet baseline), from the description of its layers."""
    shapes: dict[str, tuple[int, ...]] = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}

    def normed(name: str, out: int, in_: int, size: int) -> None:
        shapes[f"backbone.bottom_up.{name}.weight"] = (out, in_, size, size)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"backbone.bottom_up.{name}.norm.{leaf}"] = (out,)

    def biased(name: str, out: int, in_: int, size: int) -> None:
        shapes[f"{name}.weight"] = (out, in_, size, size)
        shapes[f"{name}.bias"] = (out,)

    normed("stem.conv1", 64, 3, 7)
    channels = 64
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        middle, out = 16 << stage, 64 << stage
        for b in range(blocks):
            if b == 0:
                normed(f"res{stage}.0.shortcut", out, channels, 1)
            normed(f"res{stage}.{b}.conv1", middle, channels, 1)
            normed(f"res{stage}.{b}.conv2", middle, middle, 3)
            normed(f"res{stage}.{b}.conv3", out, middle, 1)
            channels = out
    for level in range(2 if query else 3, 6):
        biased(f"backbone.fpn_lateral{level}", 256, 64 << level, 1)
        biased(f"backbone.fpn_output{level}", 256, 256, 3)
    biased("backbone.top_block.p6", 256, 2048, 3)
    biased("backbone.top_block.p7", 256, 256, 3)
    head = "det_head" if query else "head"
    for i in range(4):
        for tower in ("cls", "bbox"):
            biased(f"det_head.{tower}_layer_{i}" if query else f"head.{tower}_subnet.{2 * i}", 256, 256, 3)
        if query:
            biased(f"query_head.layer_{i}", 256, 256, 3)
    biased(f"{head}.cls_score", 9 * num_classes, 256, 3)
    biased(f"{head}.bbox_pred", 36, 256, 3)
    if query:
        biased("query_head.pred_net", 1, 256, 3)
    return shapes


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: build_model(config))
    style = {"query": config.query.enabled, "normed": config.head.norm == "group"}
    return {torch_name(p, **style): torch_shape(v.shape, p) for p, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("num_classes", [10, 80])
def test_querydet_has_the_published_tensors(num_classes: int) -> None:
    published = published_shapes(num_classes, query=True)
    assert len(published) == 317
    assert model_shapes(ModelConfig(num_classes=num_classes)) == published
    trainable = {
        name: shape for name, shape in published.items()
        if ".norm." not in name and "stem" not in name and ".res2." not in name and "pixel" not in name
    }  # fmt: skip
    assert len(trainable) == 92
    if num_classes == 80:
        assert sum(map(math.prod, trainable.values())) == 40_711_669


def test_retinanet_has_the_published_tensors() -> None:
    published = published_shapes(10, query=False)
    assert len(published) == 303
    assert model_shapes(ModelConfig(num_classes=10, min_level=3, query=QueryConfig(enabled=False))) == published


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_live_norms_have_names(norm: str) -> None:
    frozen = model_shapes(ModelConfig())
    live = model_shapes(ModelConfig(backbone=BackboneConfig(norm=norm)))  # pyright: ignore[reportArgumentType]
    if norm == "group":
        frozen = {name: shape for name, shape in frozen.items() if "running" not in name}
    assert live == frozen


@pytest.mark.parametrize("norm", ["none", "group"])
def test_fcos_has_detectron2s_tensors(norm: Any) -> None:
    """RetinaNet's, but for one anchor a cell, the centerness, and P6 from P5; group norms count in nn.Sequential."""
    published = published_shapes(10, query=False)
    for layer, outputs in (("cls_score", 10), ("bbox_pred", 4), ("ctrness", 1)):
        published |= {f"head.{layer}.weight": (outputs, 256, 3, 3), f"head.{layer}.bias": (outputs,)}
    published["backbone.top_block.p6.weight"] = (256, 256, 3, 3)
    if norm == "group":
        for tower, i in itertools.product(("cls", "bbox"), range(4)):
            for leaf in ("weight", "bias"):
                conv = published.pop(f"head.{tower}_subnet.{2 * i}.{leaf}")
                published[f"seq.{tower}_subnet.{3 * i}.{leaf}"] = conv
                published[f"seq.{tower}_subnet.{3 * i + 1}.{leaf}"] = (256,)
        published = {name.replace("seq.", "head."): shape for name, shape in published.items()}
    config = ModelConfig(
        detector="fcos",
        num_classes=10,
        min_level=3,
        fpn=FPNConfig(top_source="p5"),
        head=HeadConfig(norm=norm),
        query=QueryConfig(enabled=False),
    )
    assert model_shapes(config) == published


@pytest.mark.parametrize(
    "detectron2, querydet",
    [
        ("head.cls_subnet.3.weight", "det_head.cls_layer_1.weight"),
        ("head.bbox_subnet.10.bias", "det_head.bbox_layer_3.norm.bias"),
        ("head.ctrness.bias", "det_head.ctrness.bias"),
    ],
)
def test_both_head_styles_with_norms(detectron2: str, querydet: str) -> None:
    for name in (detectron2, querydet):
        assert official_name(name, query=True, style="detectron2", normed=True) == querydet
        assert official_name(name, query=False, style="detectron2", normed=True) == detectron2
    relu = "head.cls_subnet.2.weight"
    assert official_name(relu, query=True, style="detectron2", normed=True) == relu


def test_unknown_variable_is_an_error() -> None:
    with pytest.raises(WeightsError, match="model variable head.scale.0: has no official name"):
        torch_name(("head", "scale", 0), query=True)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("pixel_mean", "pixel_mean"),
        ("module.pixel_std", "pixel_std"),
        ("_orig_mod.pixel_std", "pixel_std"),
        ("module._orig_mod.query_head.pred_net.bias", "query_head.pred_net.bias"),
        ("_forward_module.model.pixel_std", "pixel_std"),
        ("module.model.backbone.fpn_lateral3.bias", "backbone.fpn_lateral3.bias"),
        ("backbone.bottom_up.res4.5.conv2.norm.running_var", "backbone.bottom_up.res4.5.conv2.norm.running_var"),
        # a bare backbone, of detectron2's converted files
        ("stem.conv1.weight", "backbone.bottom_up.stem.conv1.weight"),
        ("res2.0.shortcut.norm.bias", "backbone.bottom_up.res2.0.shortcut.norm.bias"),
        ("backbone.res5.2.conv3.weight", "backbone.bottom_up.res5.2.conv3.weight"),
        ("stem.fc.weight", None),
        # torchvision
        ("conv1.weight", "backbone.bottom_up.stem.conv1.weight"),
        ("bn1.running_mean", "backbone.bottom_up.stem.conv1.norm.running_mean"),
        ("bn1.num_batches_tracked", None),
        ("layer1.0.conv1.weight", "backbone.bottom_up.res2.0.conv1.weight"),
        ("layer3.22.bn3.weight", "backbone.bottom_up.res4.22.conv3.norm.weight"),
        ("layer4.0.downsample.0.weight", "backbone.bottom_up.res5.0.shortcut.weight"),
        ("layer4.0.downsample.1.running_var", "backbone.bottom_up.res5.0.shortcut.norm.running_var"),
        ("fc.bias", None),
        # torchvision's MobileNetV2 and ShuffleNetV2
        ("features.0.1.weight", "backbone.bottom_up.stem.norm.weight"),
        ("features.1.conv.0.0.weight", "backbone.bottom_up.level1.0.depthwise.weight"),
        ("features.1.conv.2.bias", "backbone.bottom_up.level1.0.project.norm.bias"),
        ("features.7.conv.1.1.running_var", "backbone.bottom_up.level4.0.depthwise.norm.running_var"),
        ("features.14.conv.0.0.weight", "backbone.bottom_up.level5.0.expand.weight"),
        ("features.17.conv.2.weight", "backbone.bottom_up.level5.3.project.weight"),
        ("features.18.0.weight", None),
        ("classifier.1.weight", None),
        ("conv1.1.bias", "backbone.bottom_up.stem.conv1.norm.bias"),
        ("stage2.0.branch1.2.weight", "backbone.bottom_up.level3.0.shortcut.project.weight"),
        ("stage3.7.branch2.4.running_mean", "backbone.bottom_up.level4.7.depthwise.norm.running_mean"),
        ("conv5.0.weight", "backbone.bottom_up.last.weight"),
        # timm's MobileNetV2
        ("conv_stem.weight", "backbone.bottom_up.stem.weight"),
        ("blocks.0.0.conv_pw.weight", "backbone.bottom_up.level1.0.project.weight"),
        ("blocks.4.1.conv_pw.weight", "backbone.bottom_up.level4.5.expand.weight"),
        ("blocks.6.0.bn3.running_var", "backbone.bottom_up.level5.3.project.norm.running_var"),
        ("conv_head.weight", None),
        ("bn2.running_mean", None),
        # Caffe2
        ("conv1_w", "backbone.bottom_up.stem.conv1.weight"),
        ("res_conv1_bn_s", "backbone.bottom_up.stem.conv1.norm.weight"),
        ("res_conv1_bn_beta", "backbone.bottom_up.stem.conv1.norm.bias"),
        ("res4_22_branch2b_w", "backbone.bottom_up.res4.22.conv2.weight"),
        ("res2_0_branch1_bn_riv", "backbone.bottom_up.res2.0.shortcut.norm.running_var"),
        ("res5_2_branch2c_bn_running_mean", "backbone.bottom_up.res5.2.conv3.norm.running_mean"),
        ("fc1000_w", None),
        ("pred_b", None),
        ("res2_0_branch2a_w_momentum", None),
        # not weights
        ("anchor_generator.cell_anchors.0", None),
        ("query_anchor_generator.cell_anchors.1", None),
        # left alone
        ("roi_heads.box_head.fc1.weight", "roi_heads.box_head.fc1.weight"),
        ("head.cls_subnet.1.weight", "head.cls_subnet.1.weight"),
    ],
)
def test_official_names(name: str, wanted: str | None) -> None:
    style = naming_style([name])
    assert official_name(name, query=True, style=style) == wanted
    assert official_name(name, query=False, style=style) == wanted


@pytest.mark.parametrize(
    "querydet, retinanet",
    [
        ("det_head.cls_layer_0.weight", "head.cls_subnet.0.weight"),
        ("det_head.bbox_layer_3.bias", "head.bbox_subnet.6.bias"),
        ("det_head.cls_score.bias", "head.cls_score.bias"),
        ("det_head.bbox_pred.weight", "head.bbox_pred.weight"),
    ],
)
def test_both_head_styles(querydet: str, retinanet: str) -> None:
    for name in (querydet, retinanet):
        assert official_name(name, query=True, style="detectron2") == querydet
        assert official_name(name, query=False, style="detectron2") == retinanet


def test_naming_style() -> None:
    assert naming_style(["module.layer1.0.conv1.weight"]) == "torchvision"
    assert naming_style(["features.3.conv.2.weight"]) == naming_style(["stage2.0.branch1.0.weight"]) == "torchvision"
    assert naming_style(["bn1.weight", "layer1.0.conv1.weight"]) == "torchvision"
    assert naming_style(["bn1.weight", "blocks.0.0.conv_dw.weight"]) == "timm"
    assert naming_style(["res2_0_branch2a_w"]) == "caffe2"
    assert naming_style(["stem.conv1.weight", "res2.0.conv1.weight", "fc.weight"]) == "detectron2"


def test_layouts() -> None:
    """OIHW[o, i, y, x] is HWIO[y, x, i, o]."""
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    torch = to_torch_layout(kernel, ("kernel",))
    assert torch.shape == torch_shape(kernel.shape, ("kernel",)) == (5, 4, 2, 3)
    assert torch[4, 3, 1, 2] == kernel[1, 2, 3, 4]
    np.testing.assert_array_equal(from_torch_layout(torch, ("kernel",), kernel.shape), kernel)
    mean = to_torch_layout(np.arange(3), ("pixel_mean",))
    assert mean.shape == (3, 1, 1) and from_torch_layout(mean, ("pixel_mean",), (3,)).tolist() == [0, 1, 2]
    fc1 = ("box_head", "fc1", "kernel")
    torch = to_torch_layout(kernel, fc1)  # torch flattens [C, S, S]
    assert torch.shape == torch_shape(kernel.shape, fc1) == (5, 4 * 2 * 3)
    np.testing.assert_array_equal(torch[1].reshape(4, 2, 3), kernel[..., 1].transpose(2, 0, 1))
    np.testing.assert_array_equal(from_torch_layout(torch, fc1, kernel.shape), kernel)
