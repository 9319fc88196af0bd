"""EfficientNet-Lite0 (Tan and Le 2019; the Lite variant has no squeeze-and-excitation, and ReLU6)."""

from __future__ import annotations

from querydet_jax.models.backbones.inverted_bottleneck import InvertedBottleneckNet, Stage


class EfficientNetLite(InvertedBottleneckNet):
    """Map normalised pixels ``[B, H, W, 3]`` to ``{2: C2, .., 5: C5}`` with 24, 40, 112 and 320 channels.

    As the ImageNet weights require, strided convolutions use TensorFlow's padding ("SAME": the odd
    cell at the bottom and right), and pixels are RGB, (x - 127) / 128.
    """

    STAGES = {
        1: (Stage(3, 1, 1, 16, 1),),
        2: (Stage(3, 2, 6, 24, 2),),
        3: (Stage(5, 2, 6, 40, 2),),
        4: (Stage(3, 2, 6, 80, 3), Stage(5, 1, 6, 112, 3)),
        5: (Stage(5, 2, 6, 192, 4), Stage(3, 1, 6, 320, 1)),
    }
    EPSILON = 1e-3
    PADDING = "same"
