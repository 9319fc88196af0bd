"""The paper's main model.

COCO is a folder with annotations/instances_{train,val}2017.json, train2017/ and val2017/. With --data.source tfds it is
the data directory of a copy in ArrayRecord (querydet prepare coco). R-50.pkl is detectron2's
ImageNetPretrained/MSRA/R-50.pkl.

Learning rate and schedule are for 16 images per step over all devices of all hosts. For k times as many images
(--train.batch-size), multiply --train.learning-rate by k and divide --train.steps and --train.decay-steps by k
(docs/scaling.md; not tried here).

One training gives these rows:
  Tables 1 and 3  python eval.py runs/coco_querydet_r50 (dense and CSQ)
  Table 4, P4     the same; "no query" is dense. P3, P5 and P6: coco_querydet_r50_start_p3.py and its neighbours
  Table 5         --methods dense cq ccq csq, or python benchmark.py table5 --run runs/coco_querydet_r50 --images 0
  Table 6         --methods csq --inference.context 0 (1x1) to 5 (11x11), or python benchmark.py table6 likewise
"""

from querydet_jax.config import Card, Config, DataConfig, InferenceConfig, ModelConfig, TrainConfig

card = Card(
    title=(
        'QueryDet, ResNet-50, COCO, 1x schedule (paper Table 1, rows "QueryDet"; last rows of Table 3; Tables 5 and 6)'
    ),
    reproduces=(
        "AP 38.53, APs 24.64 dense at 4.85 FPS; AP 38.36, APs 24.33 with CSQ at 14.88 FPS (paper, one RTX 2080Ti)"
    ),
    command="python train.py configs/coco_querydet_r50.py --data.root COCO --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 16 devices in all",
    needs="COCO and an accelerator",
)
config = Config(
    name="coco_querydet_r50",
    model=ModelConfig(num_classes=80),
    data=DataConfig(source="coco", root="coco"),
    train=TrainConfig(batch_size=16, steps=90_000, learning_rate=0.01, decay_steps=(60_000, 80_000)),
    inference=InferenceConfig(query="csq", max_detections=200),
)
