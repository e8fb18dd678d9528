"""``train.products``: cheaper matrix products, what they need, and how they are switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from cmpose.config import Config, TrainConfig
from cmpose.distributed import World
from cmpose.models.cmpose import CMPose
from cmpose.models.fp8 import ALIGNMENT
from cmpose.models.layers import Linear
from cmpose.models.vit import VIT_SIZES
from cmpose.train.float16_sums import Float16Sums

FP8 = ("fp8", "fp8_emulated")

FIRST_WITH_FP8 = (8, 9)
"""The least compute capability with products in fp8: Ada, then Hopper (9.0) and Blackwell."""

HALVED = ((8, 6), (8, 9), (12, 0))
"""Compute capabilities whose GeForce cards sum 16-bit products in float32 at half the rate."""


def use_products(model: CMPose, products: str) -> None:
    """Tells the backbone's and the criss-cross network's linear maps how to take products.

    The first layer (patches to tokens), the last ones (the head), the temporal fusion and Fine
    Token Enhancement's small ones stay as they are.
    """
    if products not in FP8:
        return
    for part in (model.backbone.blocks, model.coarse.criss_cross):
        for module in part.modules():
            if isinstance(module, Linear):
                module.fp8 = "emulated" if products == "fp8_emulated" else "card"


@contextmanager
def sums_of_products(products: str) -> Iterator[None]:
    """Within it float16 products are summed in float16 if the recipe wants that.

    By cuBLAS, or as it does (:mod:`cmpose.train.float16_sums`). It goes around a step and not
    around a run, whose evaluation takes plain products.
    """
    setting = torch.backends.cuda.matmul
    before = setting.allow_fp16_accumulation
    setting.allow_fp16_accumulation = products == "fp16_accumulate"
    emulation = Float16Sums() if products == "fp16_accumulate_emulated" else nullcontext()
    try:
        with emulation:
            yield
    finally:
        setting.allow_fp16_accumulation = before


def check_channels(config: Config) -> None:
    """Raises ValueError where a linear map has channels that fp8 products cannot take."""
    model = config.model
    hidden = int(VIT_SIZES[model.backbone].width * model.mlp_ratio)
    if config.train.products in FP8 and hidden % ALIGNMENT:
        raise ValueError(
            f"train.products={config.train.products!r}: model.mlp_ratio={model.mlp_ratio:g} makes "
            f"MLPs of {hidden} channels, products in fp8 take multiples of {ALIGNMENT}: use "
            "another model.mlp_ratio, or train.products=plain"
        )


def check_products(train: TrainConfig, world: World) -> None:
    """Raises ValueError for products that this device or precision does not have."""
    if train.products == "fp8":
        _check_fp8(train, world.device)
    if train.products.startswith("fp16_accumulate"):
        _check_fp16_accumulate(train, world.device)


def _check_fp8(train: TrainConfig, device: torch.device) -> None:
    requirement = (
        "train.products='fp8' needs a card of compute capability 8.9 or higher (RTX 40, Hopper"
    )
    remedy = "use train.products=plain, or fp8_emulated to see what fp8 does to the loss"
    if device.type != "cuda":
        raise ValueError(f"{requirement}, or later), but train.device is {device.type}: {remedy}")
    has = torch.cuda.get_device_capability(device)
    if has < FIRST_WITH_FP8:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{requirement}, or later), {name} has {has[0]}.{has[1]}: {remedy}")
    if train.precision == "fp32":
        raise ValueError(
            "train.products='fp8' gives 16-bit numbers, train.precision is 'fp32': use "
            "train.precision=bf16, or train.products=plain"
        )


def _check_fp16_accumulate(train: TrainConfig, device: torch.device) -> None:
    if train.precision != "fp16":
        raise ValueError(
            f"train.products={train.products!r} sums products of float16, train.precision is "
            f"{train.precision!r}: use train.precision=fp16, or train.products=plain"
        )
    if train.products == "fp16_accumulate_emulated":
        if train.speed not in ("auto", "eager"):
            raise ValueError(
                f"train.products='fp16_accumulate_emulated' takes the place of torch's operators, "
                f"which train.speed={train.speed!r} compiles: use train.speed=eager"
            )
        return
    remedy = "use train.products=plain, or fp16_accumulate_emulated to see what it does to the loss"
    if device.type != "cuda":
        raise ValueError(
            "train.products='fp16_accumulate' is a GeForce card's, but train.device is "
            f"{device.type}: {remedy}"
        )
    name, has = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if "GeForce" not in name or has not in HALVED:
        raise ValueError(
            "train.products='fp16_accumulate' is for GeForce RTX 30, 40 and 50, which sum in "
            f"float32 at half the rate; {name} ({has[0]}.{has[1]}) gains nothing from it and "
            "would only lose digits: use train.products=plain"
        )
