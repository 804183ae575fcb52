"""Detection models that learn on a CPU in seconds, named by import path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign


class Backbone(nn.Sequential):
    """Pictures (B, 3, H, W) -> features (B, 32, H / 8, W / 8)."""

    out_channels = 32

    def __init__(self, momentum: float) -> None:
        layers: list[nn.Module] = []
        for num_in, num_out in ((3, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(num_in, num_out, 3, 2, 1), nn.BatchNorm2d(num_out, momentum=momentum), nn.ReLU()]
        super().__init__(*layers)


def faster_rcnn(num_classes: int = 3, momentum: float = 0.1, **arguments: Any) -> FasterRCNN:
    """Returns a Faster R-CNN for pictures of about 64 pixels; with no momentum BatchNorm's statistics stay."""
    torch.manual_seed(0)
    return FasterRCNN(
        Backbone(momentum),
        min_size=64,
        max_size=128,
        size_divisible=8,
        rpn_anchor_generator=AnchorGenerator(((24,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
        box_head=TwoMLPHead(32 * 25, 64),
        box_predictor=FastRCNNPredictor(64, num_classes),
        rpn_pre_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=20,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=32,
        **arguments,
    )
