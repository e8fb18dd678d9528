"""transformers' VitPose with random weights, and the same weights under other layouts' keys.

The key names are written down here a second time and in the other direction, so that a wrong rule
in ``cmpose/models/weights/layouts.py`` is not repeated here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cmpose.config import ModelConfig
from cmpose.models.cmpose import CMPose
from cmpose.models.vit import NORM_EPS, VIT_SIZES

if TYPE_CHECKING:  # it takes seconds to import, in every process that collects the tests
    from transformers import VitPoseForPoseEstimation

COCO = 17


def _drawn(module: nn.Module, seed: int) -> None:
    """Sets weights that keep activations at unit scale; none stays at zero or one.

    Each tensor is a part of one pool of random numbers, which begins at a random index: drawing 630
    million numbers would take longer than the rest of the tests.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(1 << 24).uniform_(-1.0, 1.0, generator=generator)

    def fill(tensor: Tensor, low: float, high: float) -> None:
        start = int(torch.randint(len(pool) - tensor.numel(), (1,), generator=generator))
        tensor.copy_(pool[start : start + tensor.numel()].view_as(tensor))
        tensor.mul_((high - low) / 2).add_((high + low) / 2)

    for name, tensor in module.state_dict().items():
        if tensor.dtype == torch.int64:
            tensor.fill_(3)
        elif "norm" in name and name.endswith(("weight", "running_var")):
            fill(tensor, 0.5, 1.5)
        elif tensor.dim() > 1 and "position" not in name:
            # A stride-2 deconvolution applies a quarter of its kernel to each output pixel.
            inputs = tensor.shape[0] * 4 if "deconv" in name else tensor[0].numel()
            limit = (3.0 / inputs) ** 0.5
            fill(tensor, -limit, limit)
        else:
            fill(tensor, -0.5, 0.5)


def vitpose(
    size: str, image_size: tuple[int, int] = (64, 48), seed: int = 0, **fields
) -> VitPoseForPoseEstimation:
    """transformers' model of one of our sizes, in eval mode, with the original's layer-norm ε."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    shape = VIT_SIZES[size]
    backbone = VitPoseBackboneConfig(
        image_size=list(image_size),
        hidden_size=shape.width,
        num_hidden_layers=fields.pop("depth", shape.depth),
        num_attention_heads=shape.heads,
        layer_norm_eps=NORM_EPS,  # transformers' default is 1e-12, ViTPose's 1e-6
        **{name: fields.pop(name) for name in ("num_experts", "part_features") if name in fields},
    )
    fields = {"use_simple_decoder": False} | fields
    config = VitPoseConfig(backbone_config=backbone, num_labels=COCO, **fields)
    with torch.device("meta"):  # the usual initialisation takes longer than all the rest
        model = VitPoseForPoseEstimation(config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        _drawn(model, seed)
    return model


def cmpose(size: str, image_size: tuple[int, int] = (64, 48), **fields) -> CMPose:
    """cmpose's model of that size, for COCO's keypoints, with uninitialised weights."""
    with torch.device("meta"):
        model = CMPose(
            ModelConfig(
                backbone=size,  # type: ignore[arg-type]
                **{"image_size": image_size, "num_keypoints": COCO, "fine": "off"} | fields,
            )
        )
    return model.to_empty(device="cpu").eval()


@torch.no_grad()
def outputs(model: VitPoseForPoseEstimation, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, N, D] and heatmaps [B, K, h, w] of transformers' model."""
    experts = model.config.backbone_config.num_experts > 1
    index = torch.zeros(len(pixels), dtype=torch.int64) if experts else None
    features = model.backbone(pixels, dataset_index=index).feature_maps[-1]
    return features, model(pixels, dataset_index=index).heatmaps


@torch.no_grad()
def outputs_of_ours(model: CMPose, images: Tensor) -> tuple[Tensor, Tensor]:
    """The same of cmpose's backbone and head alone, frame by frame."""
    features = model.backbone(images)
    return features, model.head(features)  # type: ignore[call-arg]


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under the keys of the ViTPose repository."""
    names = {
        "backbone.embeddings.position_embeddings": "backbone.pos_embed",
        "backbone.embeddings.patch_embeddings.projection": "backbone.patch_embed.proj",
        "backbone.encoder.layer": "backbone.blocks",
        "attention.output.dense": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "backbone.layernorm": "backbone.last_norm",
        "head.deconv1": "keypoint_head.deconv_layers.0",
        "head.batchnorm1": "keypoint_head.deconv_layers.1",
        "head.deconv2": "keypoint_head.deconv_layers.3",
        "head.batchnorm2": "keypoint_head.deconv_layers.4",
        "head.conv": "keypoint_head.final_layer",
    }
    renamed = {}
    for key, tensor in state.items():
        if ".attention.attention." in key:
            if ".query." not in key:
                continue
            parts = [state[key.replace(".query.", f".{n}.")] for n in ("query", "key", "value")]
            key, tensor = key.replace("attention.attention.query", "attn.qkv"), torch.cat(parts)
        for theirs, new in names.items():
            key = key.replace(theirs, new)
        renamed[key] = tensor
    return renamed


def mmpose(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original's keys → mmpose 1.x's; the class token's position is added to the patches'."""
    names = {
        "patch_embed.proj": "patch_embed.projection",
        "backbone.blocks": "backbone.layers",
        "norm1": "ln1",
        "norm2": "ln2",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
        "last_norm": "ln1",
        "keypoint_head": "head",
    }
    renamed = {}
    for key, tensor in state.items():
        if key == "backbone.pos_embed":
            tensor = tensor[:, 1:] + tensor[:, :1]
        for theirs, new in names.items():
            key = key.replace(theirs, new)
        renamed[key] = tensor
    return renamed


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original's backbone under timm's and MAE's keys, which have a class token."""
    renamed = {
        key.removeprefix("backbone.").replace("last_norm", "norm"): tensor
        for key, tensor in state.items()
        if key.startswith("backbone.")
    }
    return renamed | {"cls_token": torch.zeros_like(renamed["pos_embed"][:, :1])}
