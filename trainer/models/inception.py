"""The Inception-v3 that FID is defined on: the network of 2015-12-05, of 1008 classes.

Always holds: state-dict keys and shapes equal those of `pt_inception-2015-12-05-6726825d.pth`, the public port of the
TensorFlow graph's weights; pictures come as 299 px, already resized (feature_networks.py says by what rule). It differs
from other Inception-v3 where that graph does: average pools do not count their padding, the last block pools by maximum
(an error of the graph that all published figures have). Called by evaluation only; nothing trains it.

Sources: Szegedy et al. 2016; Heusel et al. 2017; for what the graph differs in, the documentation of pytorch-fid.

Legend: B batch, C channels, H W image, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.layers import expect_shape

SIDE, FEATURES, CLASSES = 299, 2048, 1008


class Inception(nn.Module):
    """(pooled features [B, 2048], logits without the bias [B, 1008]) of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Reduced17(288)
        self.Mixed_6b = Mixed17(128)
        self.Mixed_6c = Mixed17(160)
        self.Mixed_6d = Mixed17(160)
        self.Mixed_6e = Mixed17(192)
        self.Mixed_7a = Reduced8(768)
        self.Mixed_7b = Mixed8(1280, averaged)
        self.Mixed_7c = Mixed8(2048, maximal)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures [B, 3, 299, 299] in [-1, 1). Raises ValueError for another shape.

        The logits lack the bias, as the Inception Score's own code has them (Salimans et al. 2016).
        """
        expect_shape("x", x_BCHW, (len(x_BCHW), 3, SIDE, SIDE))
        x_BCHW = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BCHW)))
        x_BCHW = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x_BCHW, 3, 2)))
        x_BCHW = F.max_pool2d(x_BCHW, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x_BCHW = getattr(self, f"Mixed_{name}")(x_BCHW)
        pooled_BD = x_BCHW.mean(dim=(2, 3))
        return pooled_BD, F.linear(pooled_BD, self.fc.weight)


class Unit(nn.Module):
    """Convolution, batch normalisation, rectifier."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


def averaged(x_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def maximal(x_BCHW: Tensor) -> Tensor:
    return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)


def row(channels_in: int, channels_out: int) -> Unit:
    return Unit(channels_in, channels_out, (1, 7), padding=(0, 3))


def column(channels_in: int, channels_out: int) -> Unit:
    return Unit(channels_in, channels_out, (7, 1), padding=(3, 0))


class Mixed35(nn.Module):
    """At 35 px: 224 channels and those of the pool."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(channels, 64, 1)
        self.branch5x5_1 = Unit(channels, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(channels, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(channels, pooled, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x_BCHW)))
        five = self.branch5x5_2(self.branch5x5_1(x_BCHW))
        return torch.cat([self.branch1x1(x_BCHW), five, double, self.branch_pool(averaged(x_BCHW))], 1)


class Reduced17(nn.Module):
    """From 35 px to 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(channels, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x_BCHW)))
        return torch.cat([self.branch3x3(x_BCHW), double, F.max_pool2d(x_BCHW, 3, 2)], 1)


class Mixed17(nn.Module):
    """At 17 px, by rows and columns of 7."""

    def __init__(self, inner: int, channels: int = 768) -> None:
        super().__init__()
        self.branch1x1 = Unit(channels, 192, 1)
        self.branch7x7_1 = Unit(channels, inner, 1)
        self.branch7x7_2 = row(inner, inner)
        self.branch7x7_3 = column(inner, 192)
        self.branch7x7dbl_1 = Unit(channels, inner, 1)
        self.branch7x7dbl_2 = column(inner, inner)
        self.branch7x7dbl_3 = row(inner, inner)
        self.branch7x7dbl_4 = column(inner, inner)
        self.branch7x7dbl_5 = row(inner, 192)
        self.branch_pool = Unit(channels, 192, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x_BCHW)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x_BCHW)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x_BCHW), seven, double, self.branch_pool(averaged(x_BCHW))], 1)


class Reduced8(nn.Module):
    """From 17 px to 8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(channels, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(channels, 192, 1)
        self.branch7x7x3_2 = row(192, 192)
        self.branch7x7x3_3 = column(192, 192)
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x_BCHW))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x_BCHW))))
        return torch.cat([three, seven, F.max_pool2d(x_BCHW, 3, 2)], 1)


class Mixed8(nn.Module):
    """At 8 px, with branches that fork."""

    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Unit(channels, 320, 1)
        self.branch3x3_1 = Unit(channels, 384, 1)
        self.branch3x3_2a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(channels, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Unit(channels, 192, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x_BCHW), self.branch3x3dbl_2(self.branch3x3dbl_1(x_BCHW))
        forks = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        forks += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x_BCHW), *forks, self.branch_pool(self.pool(x_BCHW))], 1)
