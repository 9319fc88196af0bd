"""VISDRONE is a folder with VisDrone2019-DET-train/ and VisDrone2019-DET-val/ as distributed.

With patches cut in advance (querydet prepare visdrone --patches) the run reads --data.train-images PATCHES
--data.no-patches. R-50.pkl is detectron2's ImageNetPretrained/MSRA/R-50.pkl. Learning rate and schedule are for 8
images per step over all devices of all hosts (coco_querydet_r50.py says how to change that).

`python eval.py runs/visdrone_querydet_r50` gives both rows, dense and with CSQ, in COCO's and the official metrics.
"""

from pathlib import Path

from querydet_jax.config import Card, DataConfig, load_config

card = Card(
    title='QueryDet, ResNet-50, VisDrone2019-DET (paper Table 2, rows "QueryDet")',
    reproduces=(
        "AP 28.35, AP50 48.21, AP75 28.78, AR500 39.42 dense at 1.16 FPS; AP 28.32, AP50 48.14, AP75 28.75, "
        "AR500 39.35 with CSQ at 2.75 FPS (paper, validation split, official metrics, one RTX 2080Ti)"
    ),
    command="python train.py configs/visdrone_querydet_r50.py --data.root VISDRONE --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 8 devices in all",
    needs="VisDrone and an accelerator",
)
config = load_config(
    Path(__file__).with_name("coco_querydet_r50.py"),
    {
        "name": "visdrone_querydet_r50",
        "model.num_classes": 10,
        "model.loss.level_weights": (1.0, 1.4, 1.8, 2.2, 2.6, 2.6),
        "model.loss.linear_max": 2.6,
        "model.loss.query_gammas": (1.3, 1.3),
        "data": DataConfig(
            source="visdrone",
            root="visdrone",
            patches=True,
            keep_empty=True,
            train_short=(1200,),
            train_max=1999,
            # Patches of 16:9 and of 4:3 images, the sizes known; then whatever else is not upright.
            train_canvases=((1152, 2016), (1216, 1632), (1216, 2016)),
            test_short=3999,
            test_max=3999,
            test_canvases=((2272, 4000), (3008, 4000)),
            max_boxes=902,  # in the fullest image
        ),
        "train.batch_size": 8,
        "train.steps": 50_000,
        "train.decay_steps": (30_000, 40_000),
        "train.clip_value": 35.0,
        "inference.soft_sigma": 0.6,
        "inference.max_detections": 500,
    },
)
