"""The baseline of visdrone_querydet_r50.py, which names data and weights."""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='RetinaNet P3..P7, ResNet-50, VisDrone2019-DET: the baseline (paper Table 2, row "RetinaNet")',
    reproduces=(
        "AP 26.21, AP50 44.90, AP75 27.10, AR500 37.21 at 2.63 FPS (paper, validation split, official "
        "metrics, one RTX 2080Ti)"
    ),
    command="python train.py configs/visdrone_retinanet_r50.py --data.root VISDRONE --train.init R-50.pkl",
    pod="the same command on every host with --hosts.auto; at most 8 devices in all",
    needs="VisDrone and an accelerator",
)
querydet = load_config(Path(__file__).with_name("visdrone_querydet_r50.py"))
config = load_config(
    Path(__file__).with_name("coco_retinanet_r50.py"),
    {
        "name": "visdrone_retinanet_r50",
        "model.num_classes": 10,
        "data": querydet.data,
        "train": querydet.train,
        "train.clip_value": 0.0,
        "inference": querydet.inference,
        "inference.query": "dense",
        "inference.score_threshold": 0.005,
    },
)
