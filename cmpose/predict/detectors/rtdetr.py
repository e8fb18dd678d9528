"""RT-DETR (Zhao et al., CVPR 2024) and its relatives, through ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from cmpose.predict.detectors.answers import corners, person_rows, sigmoid

WEIGHTS = "PekingU/rtdetr_r18vd"
"""At huggingface.co: Apache-2.0, 80 MB, trained on COCO."""

_TYPES = ("rt_detr", "rt_detr_v2", "d_fine")


class RTDetr:
    """Finds people in a picture.

    Attributes:
        box_source: what it is, for people.
        signature: by which another model can be told apart.
    """

    def __init__(self, weights: str = "", device: torch.device | None = None) -> None:
        """
        Args:
            weights: a model's name at huggingface.co, which is downloaded once, or its folder.
            device: that it runs on; None is the CPU.

        Raises:
            ValueError: transformers is not installed, or there is no such model of these kinds.
        """
        weights = weights or WEIGHTS
        where = f"--detector rtdetr:{weights}"
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                f"{where}: transformers is not installed: pip install 'cmpose[rtdetr]'"
            ) from error
        if weights.startswith((".", "/", "~")) and not Path(weights).expanduser().is_dir():
            raise ValueError(f"{where}: no such folder; {_WHAT}")
        if (folder := Path(weights).expanduser()).is_dir():
            weights = str(folder)
        try:
            config = transformers.AutoConfig.from_pretrained(weights)
            if config.model_type not in _TYPES:
                raise ValueError(f"is {config.model_type}, not one of {', '.join(_TYPES)}")
            model = transformers.AutoModelForObjectDetection.from_pretrained(weights)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())[:300]}; {_WHAT}") from error
        names = {str(name).lower(): int(i) for i, name in config.id2label.items()}
        if "person" not in names:
            raise ValueError(f"{where}: has no class person, but {', '.join(list(names)[:8])}")
        self.person, self.device = names["person"], device or torch.device("cpu")
        self.model = model.to(self.device).eval()
        self.box_source, self.signature = f"RT-DETR {weights}", _signature(model)
        self._read_preprocessing(weights)

    def _read_preprocessing(self, weights: str) -> None:
        """How pictures are made its input; the image processor itself needs torchvision."""
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(weights)
        except OSError:  # none is there: RT-DETR's own
            settings = {}
        size = settings.get("size", {})
        self.size = int(size.get("height", 640)), int(size.get("width", 640))
        zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        normalized = settings.get("do_normalize", False)
        mean, std = settings.get("image_mean", zeros), settings.get("image_std", ones)
        self._mean = self._channels(mean if normalized else zeros)
        self._std = self._channels(std if normalized else ones)

    def _channels(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """People's boxes, see ``person_rows``, in a picture, uint8 RGB [H, W, 3]."""
        height, width = picture.shape[:2]
        pixels = torch.from_numpy(picture).to(self.device).permute(2, 0, 1)[None].float() / 255
        pixels = functional.interpolate(pixels, self.size, mode="bilinear", antialias=True)
        output = self.model(pixel_values=(pixels - self._mean) / self._std)
        boxes = corners(output.pred_boxes[0].double().cpu().numpy())
        scores = sigmoid(output.logits[0, :, self.person].cpu().numpy())
        return person_rows(boxes * [width, height, width, height], scores, (width, height))


_WHAT = (
    "give a model's name at huggingface.co, such as PekingU/rtdetr_r50vd, or a folder with its "
    "config.json and model.safetensors"
)


def _signature(model: torch.nn.Module) -> str:
    """The sum of the weights' absolute values: other weights have another one."""
    return f"{sum(float(p.detach().double().abs().sum()) for p in model.parameters()):.9g}"
