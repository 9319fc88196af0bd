"""MobileNetV2 of width 1.0 (Sandler et al. 2018), a backbone of QueryDet Table 7."""

from __future__ import annotations

from querydet_jax.models.backbones.inverted_bottleneck import InvertedBottleneckNet, Stage


class MobileNetV2(InvertedBottleneckNet):
    """Map normalised pixels ``[B, H, W, 3]`` to ``{2: C2, .., 5: C5}`` with 24, 32, 96 and 320 channels.

    This is torchvision's network without the last 1x1 convolution (to 1280 channels) and the classifier.
    """

    STAGES = {
        1: (Stage(3, 1, 1, 16, 1),),
        2: (Stage(3, 2, 6, 24, 2),),
        3: (Stage(3, 2, 6, 32, 3),),
        4: (Stage(3, 2, 6, 64, 4), Stage(3, 1, 6, 96, 3)),
        5: (Stage(3, 2, 6, 160, 3), Stage(3, 1, 6, 320, 1)),
    }
    EPSILON = 1e-5
    PADDING = "symmetric"
