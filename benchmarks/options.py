"""Options that several benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What every benchmark has."""

    out: str = "runs/benchmark"
    """Folder for the json, csv and plot."""


@dataclass(frozen=True)
class RandomNetwork(Options):
    """A network without weights to load."""

    backbone: str = "resnet50"
    """Backbone, as model.backbone.name."""
    classes: int = 80
    """Number of classes."""
    channels: int = 256
    """Channels of the pyramid and the heads."""


@dataclass(frozen=True)
class RandomImage(RandomNetwork):
    """A network without weights to load, one image size and one density of queries."""

    height: int = 800
    """Height of the image in px, a multiple of 32."""
    width: int = 1344
    """Width of the image in px, a multiple of 32."""
    active: float = 0.03
    """Share of P2's cells that the cascade from P4 makes active, context 2 included."""


@dataclass(frozen=True)
class Run(Options):
    """A trained run and its validation images."""

    run: str = ""
    """Run folder of train.py (required): its model, on its validation images."""
    images: int = 100
    """Number of validation images, from the first (0: all)."""

    def images_in_words(self) -> str:
        return f"{self.run}, {self.images or 'all'} validation images, methods in turn, medians"


@dataclass(frozen=True)
class RunOrRandomNetwork(Run):
    """A trained run, or random weights: then speed alone is measured, on one random image."""

    run: str = ""
    """Run folder of train.py: measure its model on its validation images (default: random weights, speed only)."""
    images: int = 100
    """With --run: number of validation images, from the first (0: all)."""
    backbone: str = "resnet50"
    """Without --run: backbone, as model.backbone.name."""
    classes: int = 80
    """Without --run: number of classes."""
    channels: int = 256
    """Without --run: channels of the pyramid and the heads."""
    rounds: int = 20
    """Without --run: timed rounds."""

    def in_words(self, batch: int = 1) -> str:
        if self.run:
            return self.images_in_words()
        heads = "" if self.channels == 256 else f"{self.channels} channels, "
        return (
            f"random weights, {self.backbone}, {heads}{self.classes} classes, batch {batch}, "
            f"medians of {self.rounds} interleaved rounds"
        )


@dataclass(frozen=True)
class RunOrRandomImage(RunOrRandomNetwork):
    """A trained run, or random weights, one image size and one density of queries."""

    height: int = 800
    """Without --run: height of the image in px, a multiple of 32."""
    width: int = 1344
    """Without --run: width of the image in px, a multiple of 32."""
    active: float = 0.03
    """Without --run: share of P2's cells that the cascade from P4 makes active, context 2 included."""

    def in_words(self, batch: int = 1) -> str:
        size = "" if self.run else f"{self.height}x{self.width}, "
        return size + super().in_words(batch)
