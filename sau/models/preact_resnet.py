"""Pre-activation ResNet-18 for small images (He et al., "Identity Mappings in Deep Residual Networks", 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """BN-ReLU-conv, BN-ReLU-conv; a strided 1x1 convolution of the first activation where the shape changes.

    Parameter names and their order are those of the public benchmark, so state dicts can be exchanged.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=1, padding=1, bias=False)
        self.reshapes = stride != 1 or inputs != outputs
        if self.reshapes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x), inplace=True)
        shortcut = self.shortcut(a) if self.reshapes else x
        return self.conv2(F.relu(self.bn2(self.conv1(a)), inplace=True)) + shortcut


class PreActResNet18(nn.Module):
    """Stem, four stages of two blocks, mean over the image, linear layer. No batch norm before the pooling.

    Args:
        num_classes: outputs of the linear layer.
        width: channels of the first stage; the others have 2, 4 and 8 times as many. The published one is 64.
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(width, width, 1), PreActBlock(width, width, 1))
        self.layer2 = nn.Sequential(PreActBlock(width, 2 * width, 2), PreActBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(PreActBlock(2 * width, 4 * width, 2), PreActBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(PreActBlock(4 * width, 8 * width, 2), PreActBlock(8 * width, 8 * width, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.avgpool(x).flatten(1))
