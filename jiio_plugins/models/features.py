"""A feature network to compare sets of images by. It has no equilibrium."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvFeatures(nn.Module):
    """Three convolutions with pooling → ``num_features`` features, with a linear classifier on top.

    Trained as a classifier, it maps what it takes for the same class to near features. Distances
    between sets of images in these features rank generators of the same kind of images. They do not
    compare with those in the features of an Inception network.

    Args:
        in_channels: image channels.
        classes: number of classes.
        num_features: features of one image. torchmetrics looks for this name.

    Attributes:
        mean, std: of each feature over the training images, ``(num_features,)``.

    Shape:
        images ``(rows, in_channels, h, w)`` in [0, 1] → features ``(rows, num_features)``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, in_channels: int = 1, classes: int = 10, num_features: int = 64) -> None:
        super().__init__()
        self.num_features = num_features
        layers: list[nn.Module] = []
        width = in_channels
        for wider in (32, 64, 128):
            layers += [
                nn.Conv2d(width, wider, 3, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            width = wider
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_features)
        )
        self.head = nn.Linear(num_features, classes)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(rows, num_features)``, each standardised over the training images."""
        features: Tensor = (self.body(images) - self.mean) / self.std
        return features

    def logits(self, images: Tensor) -> Tensor:
        """``(rows, classes)``, to train with."""
        logits: Tensor = self.head(torch.relu(self.body(images)))
        return logits

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Take mean and deviation of the features from these images, after training."""
        features = torch.cat([self.body(part) for part in images.split(500)])
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0).clamp(min=1e-6))
