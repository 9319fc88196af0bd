"""Names of tensors: this project's module paths, and the names in other projects' files.

The *official* names are those of the published QueryDet and of detectron2's RetinaNet and FCOS, which differ only in
the detection head (``det_head.cls_layer_1`` against ``head.cls_subnet.2``). ``official_name`` also understands the
backbone names of other projects: torchvision's (which timm shares) and Caffe2's (MSRA) for a ResNet, torchvision's and
timm's for MobileNetV2, torchvision's for ShuffleNetV2, and those of the PyTorch port of EfficientNet-Lite0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Literal

import numpy as np

from querydet_jax.models.backbones.efficientnet_lite import EfficientNetLite
from querydet_jax.models.backbones.mobilenet_v2 import MobileNetV2
from querydet_jax.runtime.errors import WeightsError

ModelPath = tuple[Any, ...]  # attribute names and list indices from the root of the model to a variable
Style = Literal["detectron2", "torchvision", "caffe2", "efficientnet", "timm"]

_BACKBONE = "backbone.bottom_up."
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}

# Tensors in other checkpoints that are not a detector's weights: anchors, counters, the classifier of an ImageNet
# network, Caffe2's optimiser state.
_IGNORED = re.compile(
    r"(^|\.)(query_)?anchor_generator\.|(^|\.)num_batches_tracked$|^(backbone\.)?(bottom_up\.)?(stem\.)?fc\.|"
    r"^(fc1000|pred)_[wb]$|_momentum$|^(lr|model_iter)$|^(_conv_head|_bn1|_fc)\.|"
    r"^(features\.18|conv_head|bn2|classifier)\."
)
_CAFFE2_STEM = re.compile(r"^(?:conv1_w|(?:res_)?conv1_bn_(?P<bn>\w+))$")
_CAFFE2_BLOCK = re.compile(r"^res([2-5])_(\d+)_branch(1|2a|2b|2c)_(?:w|bn_(?P<bn>\w+))$")
_CAFFE2_CONVS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE2_NORMS = {
    "s": "weight", "gamma": "weight", "b": "bias", "beta": "bias",
    "rm": "running_mean", "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var",
}  # fmt: skip
_TORCHVISION_STEM = re.compile(r"^(conv|bn)1\.(\w+)$")
_TORCHVISION_BLOCK = re.compile(r"^layer([1-4])\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)$")
_EFFICIENTNET_STEM = re.compile(r"^_(conv_stem|bn0)\.(\w+)$")
_EFFICIENTNET_BLOCK = re.compile(r"^_blocks\.(\d+)\._(expand_conv|depthwise_conv|project_conv|bn[012])\.(\w+)$")
_EFFICIENTNET_CONVS = {
    "expand_conv": "expand", "depthwise_conv": "depthwise", "project_conv": "project",
    "bn0": "expand.norm", "bn1": "depthwise.norm", "bn2": "project.norm",
}  # fmt: skip
_EFFICIENTNET_BLOCKS = list(chain.from_iterable(EfficientNetLite.places()))
_MOBILENET_STAGES = MobileNetV2.places()
_MOBILENET_BLOCKS = list(chain.from_iterable(_MOBILENET_STAGES))
_MOBILENET_STEM = re.compile(r"^features\.0\.([01])\.(\w+)$")
_MOBILENET_BLOCK = re.compile(r"^features\.(\d+)\.conv\.(\d(?:\.[01])?)\.(\w+)$")
# Modules of a block's torch.nn.Sequential; the first block has no expansion.
_MOBILENET_FIRST = {"0.0": "depthwise", "0.1": "depthwise.norm", "1": "project", "2": "project.norm"}
_MOBILENET_CONVS = {
    "0.0": "expand", "0.1": "expand.norm", "1.0": "depthwise", "1.1": "depthwise.norm", "2": "project",
    "3": "project.norm",
}  # fmt: skip
_TIMM_STEM = re.compile(r"^(conv_stem|bn1)\.(\w+)$")
_TIMM_BLOCK = re.compile(r"^blocks\.(\d+)\.(\d+)\.(conv_pwl?|conv_dw|bn[123])\.(\w+)$")
_TIMM_FIRST = {"conv_dw": "depthwise", "bn1": "depthwise.norm", "conv_pw": "project", "bn2": "project.norm"}
_TIMM_CONVS = {
    "conv_pw": "expand", "bn1": "expand.norm", "conv_dw": "depthwise", "bn2": "depthwise.norm", "conv_pwl": "project",
    "bn3": "project.norm",
}  # fmt: skip
_SHUFFLENET_STEM = re.compile(r"^conv([15])\.([01])\.(\w+)$")
_SHUFFLENET_UNIT = re.compile(r"^stage([234])\.(\d+)\.branch([12])\.(\d)\.(\w+)$")
# Modules of a branch's torch.nn.Sequential, which numbers the ReLUs too.
_SHUFFLENET_CONVS = {
    "1": {
        "0": "shortcut.depthwise", "1": "shortcut.depthwise.norm", "2": "shortcut.project",
        "3": "shortcut.project.norm",
    },
    "2": {
        "0": "expand", "1": "expand.norm", "3": "depthwise", "4": "depthwise.norm", "5": "project", "6": "project.norm",
    },
}  # fmt: skip
_PIXELS = ("pixel_mean", "pixel_std")
# Prefixes by which DistributedDataParallel, Lightning, torch.compile and Fabric name what they wrap.
_WRAPPERS = ("module.", "model.", "_orig_mod.", "_forward_module.")
_RPN = "proposal_generator.rpn_head."
_RPN_SINGLE = re.compile(r"^proposal_generator\.rpn_head\.conv\.(weight|bias)$")
_BARE_BACKBONE = re.compile(r"^(?:backbone\.)?(?:bottom_up\.)?((?:stem|res[2-5])\..+)$")
_TOWER = re.compile(r"^(?:det_head\.(cls|bbox)_layer_|head\.(cls|bbox)_subnet\.)(\d+)\.((?:norm\.)?\w+)$")
_OUTPUT = re.compile(r"^(?:det_head|head)\.((?:cls_score|bbox_pred|ctrness)\.\w+)$")


def torch_name(path: ModelPath, query: bool, normed: bool = False) -> str:
    """Return the official name of a model variable.

    Args:
      path: keys from the module's root to the variable, e.g. ``("backbone", "res3", 0, "conv1", "kernel")``.
      query: the model has a query head, so its detection head takes QueryDet's names.
      normed: the towers of its detection head have norms, which detectron2's names number too.

    Raises:
      WeightsError: the variable has no official name.
    """
    match path:
        case (str(name),) if name in _PIXELS:
            return name
        case ("backbone", *rest, leaf):
            module = _BACKBONE + ".".join(map(str, rest))
        case ("fpn", str(name), leaf) if re.fullmatch(r"(lateral|output)\d", name):
            module = f"backbone.fpn_{name}"
        case ("fpn", "p6" | "p7" as name, leaf):
            module = f"backbone.top_block.{name}"
        case ("head", "cls_tower" | "box_tower" as tower, int(i), *norm, leaf) if norm in ([], ["norm"]):
            module = _tower("cls" if tower == "cls_tower" else "bbox", i, bool(norm), query, normed)
        case ("head", "cls_score" | "bbox_pred" | "ctrness" as name, leaf):
            module = f"{_head(query)}.{name}"
        case ("head", "trunk", int(i), leaf):
            module = f"{_RPN}conv.conv{i}"
        case ("head", "objectness", leaf):
            module = f"{_RPN}objectness_logits"
        case ("head", "deltas", leaf):
            module = f"{_RPN}anchor_deltas"
        case ("box_head", "fc1" | "fc2" as name, leaf):
            module = f"roi_heads.box_head.{name}"
        case ("box_head", "cls_score" | "bbox_pred" as name, leaf):
            module = f"roi_heads.box_predictor.{name}"
        case ("query_head", "tower", int(i), leaf):
            module = f"query_head.layer_{i}"
        case ("query_head", "pred", leaf):
            module = "query_head.pred_net"
        case _:
            module, leaf = "", ""
    if leaf not in _LEAVES:
        dotted = ".".join(map(str, path))
        raise WeightsError(f"model variable {dotted}: has no official name; add one to weights/names.py")
    return f"{module}.{_LEAVES[str(leaf)]}"


def _head(query: bool) -> str:
    return "det_head" if query else "head"


def _tower(tower: str, i: int, norm: bool, query: bool, normed: bool) -> str:
    if query:
        return f"det_head.{tower}_layer_{i}" + (".norm" if norm else "")
    # In detectron2's heads an nn.Sequential numbers the norms and ReLUs too.
    return f"head.{tower}_subnet.{_layer_places(normed) * i + norm}"


def _layer_places(normed: bool) -> int:
    return 3 if normed else 2


def official_name(name: str, query: bool, style: Style, normed: bool = False) -> str | None:
    """Return the official name of a tensor in another project's file, None if it is not a detector's weight.

    An unknown name is returned unchanged, but for the prefixes that wrappers add.

    Args:
      name: the tensor's name in the file.
      query: the model has a query head, so its detection head takes QueryDet's names.
      style: the naming style of the file (``naming_style``).
      normed: as in ``torch_name``.
    """
    name = _bare(name)
    if _IGNORED.search(name):
        return None
    backbone = _CONVERTERS[style](name) if style in _CONVERTERS else None
    if backbone is not None:
        return _BACKBONE + backbone
    if bare := _BARE_BACKBONE.match(name):
        return _BACKBONE + bare[1]
    if tower := _TOWER.match(name):
        published, baseline, number, leaf = tower[1], tower[2], int(tower[3]), tower[4]
        if published:
            norm, leaf = leaf.startswith("norm."), leaf.removeprefix("norm.")
        else:
            number, place = divmod(number, _layer_places(normed))
            norm = place == 1
            if place > normed:
                return name
        return f"{_tower(published or baseline, number, norm, query, normed)}.{leaf}"
    if single := _RPN_SINGLE.match(name):  # of an RPN of one convolution
        return f"{_RPN}conv.conv0.{single[1]}"
    if output := _OUTPUT.match(name):
        return f"{_head(query)}.{output[1]}"
    return name


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _caffe2(name: str) -> str | None:
    if stem := _CAFFE2_STEM.match(name):
        module, norm = "stem.conv1", stem["bn"]
    elif block := _CAFFE2_BLOCK.match(name):
        module, norm = f"res{block[1]}.{block[2]}.{_CAFFE2_CONVS[block[3]]}", block["bn"]
    else:
        return None
    if norm is None:
        return f"{module}.weight"
    return f"{module}.norm.{_CAFFE2_NORMS[norm]}" if norm in _CAFFE2_NORMS else None


def _torchvision(name: str) -> str | None:
    return _resnet(name) or _mobilenet(name) or _shufflenet(name)


def _resnet(name: str) -> str | None:
    if stem := _TORCHVISION_STEM.match(name):
        return f"stem.conv1.{stem[2]}" if stem[1] == "conv" else f"stem.conv1.norm.{stem[2]}"
    block = _TORCHVISION_BLOCK.match(name)
    if block is None:
        return None
    stage, number, kind, index, leaf = int(block[1]) + 1, block[2], block[3], block[4], block[5]
    if kind == "downsample.":
        conv, norm = "shortcut", index == "1"
    else:
        conv, norm = f"conv{index}", kind == "bn"
    return f"res{stage}.{number}.{conv}.{'norm.' if norm else ''}{leaf}"


def _efficientnet(name: str) -> str | None:
    if stem := _EFFICIENTNET_STEM.match(name):
        return f"stem.{stem[2]}" if stem[1] == "conv_stem" else f"stem.norm.{stem[2]}"
    block = _EFFICIENTNET_BLOCK.match(name)
    if block is None or int(block[1]) >= len(_EFFICIENTNET_BLOCKS):
        return None
    return _in_block(_EFFICIENTNET_BLOCKS[int(block[1])], _EFFICIENTNET_CONVS[block[2]], block[3])


def _mobilenet(name: str) -> str | None:
    if stem := _MOBILENET_STEM.match(name):
        return f"stem.{stem[2]}" if stem[1] == "0" else f"stem.norm.{stem[2]}"
    block = _MOBILENET_BLOCK.match(name)
    if block is None or not 1 <= int(block[1]) <= len(_MOBILENET_BLOCKS):
        return None
    conv = (_MOBILENET_FIRST if block[1] == "1" else _MOBILENET_CONVS).get(block[2])
    return _in_block(_MOBILENET_BLOCKS[int(block[1]) - 1], conv, block[3])


def _timm(name: str) -> str | None:
    if stem := _TIMM_STEM.match(name):
        return f"stem.{stem[2]}" if stem[1] == "conv_stem" else f"stem.norm.{stem[2]}"
    block = _TIMM_BLOCK.match(name)
    if block is None:
        return None
    stage, number = int(block[1]), int(block[2])
    if stage >= len(_MOBILENET_STAGES) or number >= len(_MOBILENET_STAGES[stage]):
        return None
    conv = (_TIMM_FIRST if stage == 0 else _TIMM_CONVS).get(block[3])
    return _in_block(_MOBILENET_STAGES[stage][number], conv, block[4])


def _in_block(place: tuple[int, int], conv: str | None, leaf: str) -> str | None:
    return None if conv is None else f"level{place[0]}.{place[1]}.{conv}.{leaf}"


def _shufflenet(name: str) -> str | None:
    if stem := _SHUFFLENET_STEM.match(name):
        module = "stem.conv1" if stem[1] == "1" else "last"
        return f"{module}.{stem[3]}" if stem[2] == "0" else f"{module}.norm.{stem[3]}"
    unit = _SHUFFLENET_UNIT.match(name)
    if unit is None:
        return None
    return _in_block((int(unit[1]) + 1, int(unit[2])), _SHUFFLENET_CONVS[unit[3]].get(unit[4]), unit[5])


_CONVERTERS: dict[Style, Callable[[str], str | None]] = {
    "caffe2": _caffe2, "torchvision": _torchvision, "efficientnet": _efficientnet, "timm": _timm,
}  # fmt: skip


def naming_style(names: Iterable[str]) -> Style:
    """Return the naming style of a file. All but detectron2's name only a backbone, and imply its flavour."""
    # Both a ResNet and timm's MobileNetV2 have a bn1, so it comes last: another name decides.
    for name in sorted(map(_bare, names), key=lambda name: name.startswith("bn1.")):
        for style, convert in _CONVERTERS.items():
            if convert(name):
                return style
    return "detectron2"


def to_torch_layout(array: np.ndarray, path: ModelPath) -> np.ndarray:
    """Convert HWIO kernels to OIHW (in fully connected layers to [O, C * S * S]), pixel statistics [3] to [3, 1, 1]."""
    if path[-1] == "kernel":
        array = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        return array.reshape(len(array), -1) if _is_linear(path) else array
    return array.reshape(3, 1, 1) if path[-1] in _PIXELS else array


def from_torch_layout(array: np.ndarray, path: ModelPath, shape: tuple[int, ...]) -> np.ndarray:
    """Invert ``to_torch_layout`` for a variable of this shape."""
    if path[-1] == "kernel":
        return np.ascontiguousarray(array.reshape(shape[3], shape[2], *shape[:2]).transpose(2, 3, 1, 0))
    return array.reshape(3) if path[-1] in _PIXELS else array


def torch_shape(shape: tuple[int, ...], path: ModelPath) -> tuple[int, ...]:
    """Return the torch-layout shape of a variable of the given shape."""
    if path[-1] == "kernel":
        height, width, inputs, outputs = shape
        return (outputs, inputs * height * width) if _is_linear(path) else (outputs, inputs, height, width)
    return (3, 1, 1) if path[-1] in _PIXELS else tuple(shape)


def _is_linear(path: ModelPath) -> bool:
    return path[0] == "box_head"


def likely_field(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Return the configuration field that most likely makes a tensor's shape differ from the model's."""
    # If output channels agree and input channels do not, the layer before differs.
    inputs = len(given) == len(wanted) == 4 and given[0] == wanted[0] and given[1] != wanted[1]
    if name.startswith(("head.", "det_head.")):
        if len(given) != len(wanted):
            return "model.head.norm"
        if inputs:
            return "model.fpn.channels" if re.search(r"_(layer_|subnet\.)0\.", name) else "model.head.channels"
        if ".cls_score." in name:
            return "model.num_classes (or model.detector)"
        return "model.anchors (or model.detector)" if ".bbox_pred." in name else "model.head.channels"
    if name.startswith(_RPN):
        anchors = name.startswith((_RPN + "objectness", _RPN + "anchor"))
        return "model.anchors" if anchors and not inputs else "model.head.channels (or model.fpn.channels)"
    if name.startswith("roi_heads."):
        return "model.num_classes" if "predictor" in name and given[0] != wanted[0] else "model.faster_rcnn.channels"
    if name.startswith("query_head."):
        if given[2:] != wanted[2:]:
            return "model.detector"
        return "model.fpn.channels" if inputs and name.startswith("query_head.layer_0.") else "model.query.channels"
    if name.startswith("backbone.top_block.p6.") and inputs:
        return "model.fpn.top_source (or model.backbone.name)"
    if name.startswith(("backbone.fpn_", "backbone.top_block.")):
        return "model.backbone.name" if inputs and "lateral" in name else "model.fpn.channels"
    if name.startswith(_BACKBONE):
        if name.startswith((_BACKBONE + "level", _BACKBONE + "last", _BACKBONE + "stem.weight")):
            return "model.backbone.name"  # a light network has one width
        if len(given) == len(wanted) == 4 and given[2:] != wanted[2:]:
            return "model.backbone.name"
        return "model.backbone.width" if ".stem." in name else "model.backbone.name (or model.backbone.width)"
    return "model.backbone.flavor"
