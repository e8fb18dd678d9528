"""Fixtures that several parts share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cmpose.data.rendered import render_dataset

torch.set_num_threads(2)

# Without a GPU the Triton kernels run in Triton's interpreter. It must be asked for before Triton
# is imported, so for the whole test process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    """A rendered data set: 2 training and 1 held-out sequence of 4 small frames."""
    root = tmp_path_factory.mktemp("rendered") / "data"
    for split, videos in (("train", 2), ("val", 1)):
        render_dataset(
            root, videos=videos, frames=4, seed=3, size=(144, 256), split=split, progress=False
        )
    return root
