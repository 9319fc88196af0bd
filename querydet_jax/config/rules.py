"""Check that the fields of a configuration are valid and agree with each other."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

from querydet_jax.config.bit_depth import parse_bit_depth
from querydet_jax.config.schema import AugmentConfig, Config, DataConfig, InferenceConfig, ModelConfig
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.stores import is_url

# Networks with a single width and a single flavour of weights, and that flavour.
_LIGHT_FLAVORS = {
    "efficientnet_lite0": "efficientnet_lite",
    "mobilenet_v2": "torchvision",
    "shufflenet_v2": "torchvision",
}


# Smallest and largest value of numbers, alone or in a tuple, and the fields.
_RANGES = (
    (1, math.inf, "model.backbone.width model.fpn.channels model.head.channels model.query.channels"),
    (1, math.inf, "model.anchors.sizes_per_octave"),
    (0, math.inf, "model.head.num_convs model.query.num_convs model.loss.focal_gamma model.loss.level_weights"),
    (0, math.inf, "model.loss.query_weights model.loss.query_gammas model.loss.query_radius_factor"),
    (0, 1, "model.loss.focal_alpha model.loss.query_alpha model.loss.normalizer_momentum"),
    (0, 1, "model.loss.iou_background model.loss.iou_foreground"),
    (0, 1, "data.repeat_below inference.threshold inference.score_threshold inference.nms_iou inference.soft_prune"),
    (0, math.inf, "data.cache_gb"),
    (1e-6, math.inf, "model.anchors.scale model.anchors.ratios model.loss.normalizer_init"),
)

_NAME_BYTES = 200  # file systems allow 255


def backbone_flavors(name: str) -> tuple[str, ...]:
    """Return the values of ``BackboneConfig.flavor`` that a backbone supports, the usual one first."""
    return (_LIGHT_FLAVORS[name],) if name in _LIGHT_FLAVORS else ("msra", "torchvision")


def check(config: Config) -> None:
    """Raise ConfigError, with field and remedy, if fields are invalid or contradict each other."""
    model, inference, data, train = config.model, config.inference, config.data, config.train
    _check_name(config.name)
    _check_finite(config, "")
    _check_ranges(config)
    levels = model.levels
    if not 2 <= model.min_level <= 5 <= model.max_level <= 7 or model.min_level == model.max_level:
        raise ConfigError(
            f"model.min_level {model.min_level}, model.max_level {model.max_level}: "
            "need 2 <= min_level <= 5 <= max_level <= 7 and min_level < max_level"
        )
    if model.num_classes < 1:
        raise ConfigError(f"model.num_classes {model.num_classes}: must be at least 1")
    if not 0 <= model.backbone.freeze_at <= 5:
        raise ConfigError(f"model.backbone.freeze_at {model.backbone.freeze_at}: give 0 (train all) to 5 (freeze all)")
    backbone = model.backbone
    if backbone.flavor not in (flavors := backbone_flavors(backbone.name)):
        raise ConfigError(
            f"model.backbone.name {backbone.name}, model.backbone.flavor {backbone.flavor}: set the flavor to "
            + " or ".join(flavors)
        )
    if backbone.name in _LIGHT_FLAVORS and (backbone.norm == "group" or backbone.width != 64):
        raise ConfigError(
            f"model.backbone.norm {backbone.norm}, model.backbone.width {backbone.width}: {backbone.name} has a fixed "
            "width and no group norm; set norm frozen or batch, and leave width at 64"
        )
    if not 0 < model.head.prior < 1:
        raise ConfigError(f"model.head.prior {model.head.prior}: must be a probability between 0 and 1")
    if model.head.norm == "group" and model.head.channels % 32:
        raise ConfigError(f"model.head.channels {model.head.channels}: must be a multiple of 32 with group norm")
    if model.head.norm == "group" and inference.query != "dense":
        raise ConfigError(
            f"model.head.norm group, inference.query {inference.query}: group norm needs the whole map; "
            "set inference.query dense, or train with model.head.norm none"
        )
    if model.fpn.top_source == "pool" and model.max_level > 6:
        raise ConfigError(
            f"model.fpn.top_source pool, model.max_level {model.max_level}: pooling makes P6 only; set max_level 6"
        )
    if model.detector == "faster_rcnn":
        _check_faster_rcnn(model)
    for name in ("range_scale", "center_radius"):
        if getattr(model.fcos, name) <= 0:
            raise ConfigError(f"model.fcos.{name} {getattr(model.fcos, name)}: must be above 0")
    loss = model.loss
    if loss.smooth_l1_beta <= 0:
        raise ConfigError(f"model.loss.smooth_l1_beta {loss.smooth_l1_beta}: must be above 0 (1e-6: plain L1)")
    if loss.level_weighting == "table" and len(loss.level_weights) != len(levels):
        raise ConfigError(
            f"model.loss.level_weights has {len(loss.level_weights)} entries for {len(levels)} levels "
            f"P{levels[0]}..P{levels[-1]}: give one each, or set model.loss.level_weighting to uniform or linear"
        )
    if model.query.enabled:
        if not model.query.levels:
            raise ConfigError("model.query.levels is empty: give one or more, or set model.query.enabled false")
        for name in ("query_weights", "query_gammas"):
            if len(getattr(loss, name)) != len(model.query.levels):
                raise ConfigError(
                    f"model.loss.{name} has {len(getattr(loss, name))} entries for the "
                    f"{len(model.query.levels)} levels of model.query.levels: give one each"
                )
        if not set(model.query.levels) <= set(levels):
            raise ConfigError(f"model.query.levels {model.query.levels}: not all within P{levels[0]}..P{levels[-1]}")
    if inference.query != "dense":
        if not model.query.enabled:
            raise ConfigError(
                f"inference.query {inference.query} needs a query head: set model.query.enabled, "
                "or inference.query to dense"
            )
        if not levels[0] < inference.start_level <= levels[-1]:
            raise ConfigError(
                f"inference.start_level {inference.start_level}: must be one of P{levels[0] + 1}..P{levels[-1]}"
            )
    check_fused(model, inference)
    if any(not 0 < c <= 1 for c in inference.capacities) or list(inference.capacities) != sorted(
        set(inference.capacities)
    ):
        raise ConfigError(
            f"inference.capacities {inference.capacities}: must be increasing fractions of a level's cells in (0, 1]"
        )
    if inference.overflow == "cap" and not inference.capacities:
        raise ConfigError("inference.overflow cap needs a buffer: give inference.capacities at least one fraction")
    if inference.context < 0:
        raise ConfigError(f"inference.context {inference.context}: must be at least 0")
    if inference.soft_sigma <= 0:
        raise ConfigError(f"inference.soft_sigma {inference.soft_sigma}: must be above 0")
    for name in ("chunk", "tile", "topk", "max_detections", "batch_size"):
        if getattr(inference, name) < 1:
            raise ConfigError(f"inference.{name} {getattr(inference, name)}: must be at least 1")
    for name in ("train_canvases", "test_canvases"):
        canvases = getattr(data, name)
        if not canvases or any(side % 32 or side < 32 for canvas in canvases for side in canvas):
            raise ConfigError(f"data.{name} {canvases}: give (height, width) pairs, each a multiple of 32")
    _check_augmentation(data.augment)
    if data.patches and data.source != "visdrone":
        raise ConfigError(f"data.patches: needs data.source visdrone, but data.source is {data.source}; leave it out")
    if data.source == "visdrone" and (data.train_annotations or data.val_annotations):
        raise ConfigError(
            f"data.train_annotations {data.train_annotations!r}, val_annotations {data.val_annotations!r}: source "
            "visdrone reads the annotations/ beside its images/; leave them empty"
        )
    if data.source in ("tfds", "shards") and (
        data.train_annotations or data.train_images or data.val_annotations or data.val_images
    ):
        reads = "data.tfds_name under data.root" if data.source == "tfds" else "the shards in data.root"
        raise ConfigError(
            f"data.train_annotations, train_images, val_annotations, val_images: source {data.source} reads {reads}; "
            "leave them empty"
        )
    _check_cache(data)
    parse_bit_depth(data.bit_depth)
    if data.max_pixels < 0:
        raise ConfigError(f"data.max_pixels {data.max_pixels}: must be 0 (any number) or more")
    twice = next((name for name in config.classes if config.classes.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"classes has {twice!r} twice: give each class a name of its own")
    if config.classes and len(config.classes) != model.num_classes:
        raise ConfigError(
            f"classes has {len(config.classes)} names, model.num_classes is {model.num_classes}: make them agree"
        )
    for name in ("batch_size", "accumulate", "steps", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(train, name) < 1:
            raise ConfigError(f"train.{name} {getattr(train, name)}: must be at least 1")
    rates = ("learning_rate", "momentum", "weight_decay", "warmup_factor", "decay_factor", "clip_value", "clip_norm")
    for name in ("epochs", "eval_every", "eval_images", "patience", "warmup_steps", "seed", *rates):
        if getattr(train, name) < 0:
            raise ConfigError(f"train.{name} {getattr(train, name)}: must not be negative")
    if train.best_metric and not train.eval_every:
        raise ConfigError(
            f"train.best_metric {train.best_metric}: needs evaluations; set train.eval_every above 0, or leave it empty"
        )
    if train.patience and not train.best_metric:
        raise ConfigError(f"train.patience {train.patience}: needs train.best_metric, such as csq/AP")
    if not 0 <= train.ema < 1:
        raise ConfigError(f"train.ema {train.ema}: must be 0 (no moving average) or below 1, such as 0.999")
    if model.backbone.norm == "group" and model.backbone.width % 32:
        raise ConfigError(f"model.backbone.width {model.backbone.width}: must be a multiple of 32 with group norm")


def check_fused(model: ModelConfig, inference: InferenceConfig) -> None:
    """Raise ConfigError where ``inference.kernel fused`` cannot run the model's heads."""
    if inference.kernel != "fused" or inference.query == "dense":
        return
    if inference.tile % 8:
        raise ConfigError(f"inference.tile {inference.tile}: kernel fused needs a multiple of 8, such as 8")
    for name in ("fpn", "head", "query"):
        if getattr(model, name).channels % 128:
            raise ConfigError(
                f"inference.kernel fused: model.{name}.channels {getattr(model, name).channels} is no multiple of 128; "
                "use inference.kernel tiles"
            )


def _check_cache(data: DataConfig) -> None:
    if data.cache_gb and not data.cache:
        raise ConfigError(f"data.cache_gb {data.cache_gb:g}: needs data.cache, a folder on this machine; or leave it 0")
    if is_url(data.cache):
        raise ConfigError(f"data.cache {data.cache}: must be a folder on this machine")
    if data.cache and not is_url(data.root):
        raise ConfigError(
            f"data.cache {data.cache}: data.root {data.root or '(empty)'} is on this machine, and nothing is kept of "
            "it a second time; leave data.cache empty, or give a gs:// or s3:// root"
        )


def _check_name(name: str) -> None:
    """Raise ConfigError unless ``runs/NAME`` is a folder in ``runs`` on every system."""
    wrong = ""
    if not name.isprintable():
        wrong = "has control characters or others that cannot be shown"
    elif any(character in '/\\:*?"<>|' for character in name):
        wrong = 'has one of / \\ : * ? " < > |'
    elif not name or name.strip(" .") != name:
        wrong = "is empty, or begins or ends with a dot or a space"
    elif len(name.encode()) > _NAME_BYTES:
        wrong = f"is {len(name.encode())} bytes long, more than {_NAME_BYTES}"
    if wrong:
        shown = ascii(name[:60])
        raise ConfigError(f"name {shown}: {wrong}, but is to be a folder in runs/; take letters, digits, - and _")


def _check_finite(group: Any, prefix: str) -> None:
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{prefix}{field.name}.")
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(x, float) and not math.isfinite(x) for x in values):
            raise ConfigError(f"{prefix}{field.name} {value}: must be finite")


def _check_ranges(config: Config) -> None:
    for low, high, names in _RANGES:
        for name in names.split():
            value = operator.attrgetter(name)(config)
            if not all(low <= x <= high for x in (value if isinstance(value, tuple) else (value,))):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise ConfigError(f"{name} {value}: must be {limits}")
    if not config.model.anchors.ratios:
        raise ConfigError("model.anchors.ratios is empty: give one or more, height over width")


def _check_faster_rcnn(model: ModelConfig) -> None:
    stages = model.faster_rcnn
    if model.head.norm != "none" or model.head.num_convs < 1:
        raise ConfigError(
            f"model.head.norm {model.head.norm}, model.head.num_convs {model.head.num_convs}: an RPN has at least one "
            "convolution and no norm; set norm none and num_convs 1 (Faster R-CNN) or 3 (QueryDet's)"
        )
    for name in ("train_topk", "proposals", "rpn_samples", "roi_samples", "roi_size", "channels"):
        if getattr(stages, name) < 1:
            raise ConfigError(f"model.faster_rcnn.{name} {getattr(stages, name)}: must be at least 1")
    for name in ("proposal_iou", "rpn_foreground", "roi_foreground", "roi_iou"):
        if not 0 < getattr(stages, name) <= 1:
            raise ConfigError(f"model.faster_rcnn.{name} {getattr(stages, name)}: must be above 0 and at most 1")


def _check_augmentation(augment: AugmentConfig) -> None:
    for name in ("crop_to_objects", "turn", "mosaic", "photometric"):
        if not 0 <= getattr(augment, name) <= 1:
            raise ConfigError(f"data.augment.{name} {getattr(augment, name)}: must be 0 (off) to 1")
    low, high = augment.scale
    if not 0.05 <= low <= high <= 20:
        raise ConfigError(f"data.augment.scale {low} {high}: give the smallest and the largest factor, 0.05 to 20")
    if augment.paste < 0 or augment.paste_below < 2:
        raise ConfigError(
            f"data.augment.paste {augment.paste}, paste_below {augment.paste_below}: give a number of copies, 0 or "
            "more, and a side in px, at least 2"
        )
