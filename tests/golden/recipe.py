"""Deterministic, torch-free synthetic weights and inputs for QueryDet cross-checks.

Every tensor is a pure function of (torch parameter name, shape), so a JAX test can rebuild the exact
weights used for the golden outputs without shipping a 150 MB file.  NumPy only.
"""

import zlib

import numpy as np

TUNE = dict(cls_gain=0.7, cls_bias=-3.0, box_gain=0.2, query_gain=1.0, query_bias=-1.8)


def _rng(name):
    return np.random.default_rng(zlib.crc32(name.encode("utf-8")))


def make(name, shape, tune=TUNE):
    """float32 array for a torch-named tensor (conv weights OIHW)."""
    z = _rng(name).standard_normal(tuple(shape)).astype(np.float64)
    fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else 0
    if name in ("pixel_mean", "pixel_std"):
        v = {"pixel_mean": [103.530, 116.280, 123.675], "pixel_std": [1.0, 1.0, 1.0]}[name]
        out = np.array(v).reshape(shape)
    elif ".norm." in name:
        leaf = name.rsplit(".", 1)[1]
        if leaf == "weight":
            out = (0.35 if ".conv3.norm." in name else 1.0) * (1.0 + 0.1 * z)
        elif leaf == "bias":
            out = 0.05 * z
        elif leaf == "running_mean":
            out = 0.1 * z
        elif leaf == "running_var":
            out = np.exp(0.2 * z)
        else:
            raise KeyError(name)
    elif name.endswith("stem.conv1.weight"):
        out = z * np.sqrt(2.0 / fan_in) / 60.0
    elif ".bottom_up.res" in name and name.endswith(".weight"):
        out = z * np.sqrt(2.0 / fan_in)
    elif name.startswith("backbone.") and name.endswith(".weight"):  # FPN laterals/outputs, p6, p7
        gain = 0.3 if ("lateral" in name or ".p6." in name) else (2.0 if ".p7." in name else 1.0)
        out = z * gain * np.sqrt(1.0 / fan_in)
    elif name.startswith("backbone.") and name.endswith(".bias"):
        out = 0.02 * z
    elif name.endswith("cls_score.weight"):
        out = z * tune["cls_gain"] / np.sqrt(fan_in)
    elif name.endswith("cls_score.bias"):
        out = tune["cls_bias"] + 0.1 * z
    elif name.endswith("bbox_pred.weight"):
        out = z * tune["box_gain"] / np.sqrt(fan_in)
    elif name.endswith("bbox_pred.bias"):
        out = 0.02 * z
    elif name.endswith("pred_net.weight"):
        out = z * tune["query_gain"] / np.sqrt(fan_in)
    elif name.endswith("pred_net.bias"):
        out = np.full(shape, tune["query_bias"])
    elif name.endswith(".weight"):  # head towers
        out = z * np.sqrt(2.0 / fan_in)
    elif name.endswith(".bias"):
        out = 0.05 * z
    else:
        raise KeyError(name)
    return out.astype(np.float32)


def image(tag, h, w):
    """uint8 CHW BGR test image: coarse blocks + fine noise."""
    r = np.random.default_rng(zlib.crc32(f"image:{tag}".encode()))
    out = np.zeros((3, h, w))
    for cell, amp in ((32, 70.0), (12, 45.0), (4, 25.0), (1, 12.0)):
        gh, gw = -(-h // cell), -(-w // cell)
        g = r.standard_normal((3, gh, gw)) * amp
        out += np.repeat(np.repeat(g, cell, 1), cell, 2)[:, :h, :w]
    return np.clip(np.rint(out + 118.0), 0, 255).astype(np.uint8)


def boxes(tag, n, h, w, num_classes, smin=5.0, smax=110.0):
    """(n,4) float32 xyxy boxes inside the image and (n,) int64 classes; sizes log-uniform."""
    r = np.random.default_rng(zlib.crc32(f"boxes:{tag}".encode()))
    s = np.exp(r.uniform(np.log(smin), np.log(smax), n))
    ar = np.exp(r.uniform(-0.7, 0.7, n))
    bw, bh = np.minimum(s * np.sqrt(ar), w - 2.0), np.minimum(s / np.sqrt(ar), h - 2.0)
    x0, y0 = r.uniform(0, 1, n) * (w - bw), r.uniform(0, 1, n) * (h - bh)
    b = np.stack([x0, y0, x0 + bw, y0 + bh], 1).astype(np.float32)
    return b, r.integers(0, num_classes, n).astype(np.int64)
