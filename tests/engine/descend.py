"""``python -m tests.engine.descend RECIPE OUTPUT DTYPE``: a run by plain gradient descent."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import cmpose.engine.train as engine
from cmpose import config
from cmpose.engine.evaluate import clip_images
from cmpose.models.cmpose import CMPose


class Descend(torch.optim.SGD):
    """SGD that takes AdamW's arguments."""

    def __init__(self, groups, lr, fused) -> None:
        groups = [{**group, "weight_decay": 0.0} for group in groups]
        super().__init__(groups, lr=lr, fused=fused)


class Run(engine._Run):
    """Keeps the first and the last weights in the run's own precision."""

    def run(self, resume):
        if self.world.main:
            self.output.mkdir(parents=True)
            save_file(self.core.state_dict(), self.output / "start.safetensors")
        return super().run(resume)

    def _finish(self, log, total):
        if self.world.main:
            save_file(self.core.state_dict(), self.output / "end.safetensors")
        self.core.float()  # evaluation feeds single precision
        return super()._finish(log, total)


if __name__ == "__main__":
    torch.optim.AdamW = Descend
    engine._Run = Run
    recipe, output, dtype = sys.argv[1:]
    wide = getattr(torch, dtype)
    engine.CMPose = lambda model: CMPose(model).to(wide)
    engine.clip_images = functools.partial(clip_images, dtype=wide)
    engine.train(config.load(recipe), Path(output), progress=False)
