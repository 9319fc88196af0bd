"""Everything a run can vary, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BackboneConfig:
    """A residual network (He et al. 2016) or a light one (paper Table 7), outputs C2..C5 at strides 4..32."""

    name: Literal[
        "resnet10",
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "efficientnet_lite0",
        "mobilenet_v2",  # width 1.0
        "shufflenet_v2",  # 1.0x
    ] = "resnet50"
    # msra: detectron2's conversion, stride in the 1x1, BGR minus mean. torchvision: stride in the 3x3, RGB, mean and
    # std; also MobileNetV2 and ShuffleNetV2. efficientnet_lite: that network's, RGB, (x - 127) / 128.
    flavor: Literal["msra", "torchvision", "efficientnet_lite"] = "msra"
    # frozen: fixed affine transform, as the paper trains. batch: live statistics, averaged over
    # devices. group: GroupNorm(32), independent of the batch (residual networks).
    norm: Literal["frozen", "batch", "group"] = "frozen"
    freeze_at: int = 2  # 0: train all; 1: freeze the stem; 2: stem and res2; ... 5: everything
    width: int = 64  # channels of a residual network's stem; 64 is the published network


@dataclass(frozen=True)
class FPNConfig:
    """Feature pyramid (Lin et al. 2017), no norm."""

    channels: int = 256
    # c5, p5: P6 and P7 by strided convolutions, P6 of C5 or of P5. pool: P6 is every other cell of P5, as Faster R-CNN
    # has it, and there is no P7.
    top_source: Literal["c5", "p5", "pool"] = "c5"


@dataclass(frozen=True)
class HeadConfig:
    """Detection head shared over levels: a class and a box tower; Faster R-CNN's is the one tower of its RPN."""

    channels: int = 256
    num_convs: int = 4
    # none: the same weights run densely and on sites. group: GroupNorm(32) after each convolution of the towers, for
    # dense inference, since its statistics need the whole map.
    norm: Literal["none", "group"] = "none"
    prior: float = 0.01  # initial foreground probability of the class logits (not of an RPN: 0.5)
    # torch: U(+-1/sqrt(fan_in)), as published for RetinaNet; FCOS and the RPN: always zero.
    box_bias: Literal["torch", "zero"] = "torch"


@dataclass(frozen=True)
class AnchorConfig:
    """Anchors per cell: 3 sizes an octave from ``scale * stride`` times the aspect ratios (h/w)."""

    scale: float = 4.0
    sizes_per_octave: int = 3
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def per_cell(self) -> int:
        return self.sizes_per_octave * len(self.ratios)


@dataclass(frozen=True)
class FCOSConfig:
    """What FCOS has in place of anchors and their matching (Tian et al. 2019)."""

    # P_l learns boxes whose farthest side is range_scale to twice that many strides away; the finest level nearer
    # ones too, the coarsest all that are farther. The lower end is also the query head's s_l.
    range_scale: float = 4.0
    center_radius: float = 1.5  # strides from a box's centre, in x and y, within which a point learns it


@dataclass(frozen=True)
class FasterRCNNConfig:
    """The second stage and what both stages are trained on (Ren et al. 2015; defaults are detectron2's)."""

    train_topk: int = 2000  # boxes a level before NMS in training; at inference inference.topk
    proposals: int = 1000  # boxes an image after NMS
    proposal_iou: float = 0.7  # of that NMS, which is by level
    rpn_samples: int = 256  # anchors an image that the RPN learns from
    rpn_foreground: float = 0.5  # at most this share of them foreground
    roi_samples: int = 512  # proposals an image that the second stage learns from
    roi_foreground: float = 0.25
    roi_iou: float = 0.5  # a proposal with this IoU with an object is foreground
    roi_size: int = 7  # bins a side that a proposal is pooled to
    channels: int = 1024  # of the two fully connected layers


@dataclass(frozen=True)
class QueryConfig:
    """The query head (paper section 3.2) and what it is trained on."""

    enabled: bool = True
    levels: tuple[int, ...] = (3, 4)  # levels it is trained on
    channels: int = 256  # of its own tower; Faster R-CNN's query branch sits on the RPN's
    num_convs: int = 4


@dataclass(frozen=True)
class LossConfig:
    """Losses of paper section 3.4; defaults are the published code's COCO values.

    The paper's own text differs in three named options: ``level_weighting="linear"`` (beta_l from
    1 to ``linear_max``), ``query_radius="level"`` (s_l of QueryDet eq. 3 in place of the object's own scale)
    and ``InferenceConfig.threshold=0.15``. The matcher, its IoUs and smooth L1 are RetinaNet's and the RPN's; FCOS has
    its own targets (``FCOSConfig``) and the GIoU loss. Faster R-CNN has no focal loss but the query head's, and divides
    by numbers of samples (``FasterRCNNConfig``), not by the running average.
    """

    matcher: Literal["loop", "standard"] = "loop"  # loop: QueryDet's; standard: detectron2's
    iou_background: float = 0.4
    iou_foreground: float = 0.5
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    smooth_l1_beta: float = 0.1
    # table: level_weights, finest first; linear: 1 .. linear_max over the levels; uniform: all 1.
    level_weighting: Literal["table", "linear", "uniform"] = "table"
    level_weights: tuple[float, ...] = (1.0, 1.4, 2.1, 2.5, 2.9, 3.2)
    linear_max: float = 3.0
    query_weights: tuple[float, ...] = (10.0, 10.0)  # one a query level
    query_gammas: tuple[float, ...] = (1.2, 1.2)
    query_alpha: float = 0.25
    query_radius: Literal["object", "level"] = "object"
    query_radius_factor: float = 1.0
    normalizer_init: float = 100.0
    normalizer_momentum: float = 0.9


@dataclass(frozen=True)
class ModelConfig:
    detector: Literal["retinanet", "fcos", "faster_rcnn"] = "retinanet"
    num_classes: int = 80
    min_level: int = 2  # 2: QueryDet's high resolution and Faster R-CNN; 3: plain RetinaNet or FCOS
    max_level: int = 7
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    fpn: FPNConfig = field(default_factory=FPNConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)  # of detectors retinanet and faster_rcnn
    fcos: FCOSConfig = field(default_factory=FCOSConfig)  # of detector fcos
    faster_rcnn: FasterRCNNConfig = field(default_factory=FasterRCNNConfig)  # of detector faster_rcnn
    query: QueryConfig = field(default_factory=QueryConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    # Arithmetic of convolutions. Parameters, losses, boxes and scores stay float32.
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(range(self.min_level, self.max_level + 1))


@dataclass(frozen=True)
class DataConfig:
    """Where images and boxes come from and how they become network input.

    An image is resized so that its short side is one of ``train_short`` (or ``test_short``) and its
    long side at most ``*_max``, then padded bottom and right to a fixed canvas (height, width),
    multiples of 32.
    """

    # coco: json and images. visdrone: the official folders, text files. yolo: text files, data.yaml.
    # tfds: a prepared copy of coco/2017 in ArrayRecord. scenes: generated.
    source: Literal["coco", "visdrone", "yolo", "tfds", "scenes"] = "scenes"
    root: str = ""
    tfds_name: str = "coco/2017"  # tfds: builder/configuration, its splits being train and validation
    # Relative to root. Annotations: a json (coco) or the folder of labels (yolo; visdrone has its
    # own). Images: their folder (coco, yolo) or the split's (visdrone). Empty: as the data set is
    # distributed, annotations/instances_train2017.json, train2017 (coco), VisDrone2019-DET-train
    # (visdrone), images/train and the labels/ beside (yolo), and the same for val.
    train_annotations: str = ""
    train_images: str = ""
    val_annotations: str = ""
    val_images: str = ""
    patches: bool = False  # visdrone: train on the four quarters of every image
    train_short: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    train_max: int = 1333
    test_short: int = 800
    test_max: int = 1333
    train_canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800))
    test_canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800))
    crop: bool = False  # an image larger than every training canvas is cropped at random, not refused
    flip: float = 0.5  # probability of a horizontal flip
    keep_empty: bool = False  # train also on images without boxes (crowd boxes do not count)
    max_boxes: int = 100  # G: ground-truth boxes kept an image, the rest dropped with a warning
    threads: int = 4  # decoding threads
    processes: int = 0  # decoding worker processes (0: threads of this process only)
    # scenes: number of generated pictures and their size (height, width)
    scenes_train: int = 2000
    scenes_val: int = 200
    scenes_size: tuple[int, int] = (320, 320)
    scenes_val_size: tuple[int, int] = (0, 0)  # (0, 0): as scenes_size
    scenes_seed: int = 0


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 16  # images a step, over all hosts and devices
    accumulate: int = 1  # parts of a device's images that it computes one after another, for one update: less memory
    # Heads of P2 and P3 image by image, and again in the backward pass: less memory, more time.
    remat: bool = False
    parallel: Literal["pmap", "shard_map"] = "pmap"  # what carries the step over the devices; the same results
    steps: int = 90_000
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 1000
    warmup_factor: float = 0.001
    schedule: Literal["steps", "cosine"] = "steps"
    decay_steps: tuple[int, ...] = (60_000, 80_000)
    decay_factor: float = 0.1
    clip_value: float = 0.0  # > 0: clip each gradient element to +- this
    clip_norm: float = 0.0  # > 0: clip the global gradient norm to this
    # > 0: decay of the moving average of the parameters, which is then what is evaluated and exported. In the first
    # steps less, (1 + step) / (10 + step).
    ema: float = 0.0
    seed: int = 0
    # Weights to start from (backbone or whole model): a file, a run, or efficientnet_lite0, which is
    # the ImageNet weights of requirements-efficientnet.txt.
    init: str = ""
    log_every: int = 20
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    eval_images: int = 0  # images of a mid-training evaluation; 0: all
    checkpoint_every: int = 5000
    keep_checkpoints: int = 3


@dataclass(frozen=True)
class InferenceConfig:
    """Image to detections. Defaults are the published code's COCO QueryDet values."""

    # dense: heads on every level everywhere. csq: cascade sparse query. cq: crops around the keys.
    # ccq: complete convolution, read at the keys (paper Table 5).
    query: Literal["dense", "csq", "cq", "ccq"] = "csq"
    start_level: int = 4  # the query head runs densely here; finer levels are sparse
    threshold: float = 0.12  # sigma: a cell with a query probability above it is a query
    context: int = 2  # c: radius around each key; 2 is the paper's 5x5
    # Buffer sizes as fractions of a level's cells, pooled over the batch, smallest first.
    capacities: tuple[float, ...] = (0.05, 0.25)
    # Above the largest: dense computes the level densely, so results never depend on the sizes; cap
    # keeps the best-scoring queries that fit and reports the overflow.
    overflow: Literal["dense", "cap"] = "dense"
    chunk: int = 256  # rows a turn of the convolution on sites, on CPU; other devices compute the whole buffer at once
    # gather: single cells, least work. tiles: aligned blocks of tile x tile cells, for accelerators.
    # Both compute the same.
    kernel: Literal["gather", "tiles"] = "gather"
    tile: int = 8
    score_threshold: float = 1e-4
    topk: int = 1000  # candidates a level
    # hard: overlapping boxes of a class go. linear, gaussian: their scores decay (soft-NMS, Bodla et al. 2017),
    # and the decayed scores are reported.
    nms: Literal["hard", "linear", "gaussian"] = "hard"
    nms_iou: float = 0.5  # overlap from which hard and linear act
    soft_sigma: float = 0.7  # of gaussian; the published code has 0.7 for COCO, 0.6 for VisDrone
    soft_prune: float = 1e-4  # a decayed score must stay above it
    max_detections: int = 200
    batch_size: int = 1


@dataclass(frozen=True)
class Config:
    name: str = "unnamed"
    classes: tuple[str, ...] = ()  # names for pictures and tables; empty: the data set's own
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
