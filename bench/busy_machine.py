"""What a training step takes beside other processes, by how long OpenMP's threads spin: a table.

``python -m bench.busy_machine``. Each figure is the median step of the demo's recipe in a process
of its own. The neighbours are processes that only compute. See ``cmpose/__main__.py``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from importlib.resources import files

NEIGHBOURS = (0, 2, 10)
SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own": {},
    "`GOMP_SPINCOUNT=2000`, the command line's": {"GOMP_SPINCOUNT": "2000"},
    "`OMP_WAIT_POLICY=passive`": {"OMP_WAIT_POLICY": "passive"},
}


def step_seconds(steps: int) -> float:
    """The median second of a training step: forward, losses, backward, AdamW."""
    import torch

    from cmpose import config as configuration
    from cmpose.models.cmpose import CMPose
    from cmpose.models.losses import cmpose_loss

    recipe = configuration.load(str(files("cmpose.configs") / "demo.yaml"))
    torch.manual_seed(0)
    model_config, clips = recipe.model, recipe.train.batch_size
    model = CMPose(model_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    height, width = model_config.image_size
    images = torch.randn(clips, model_config.num_frames, 3, height, width)
    centers = torch.rand(clips, model_config.num_keypoints, 2) * 20
    weight = torch.ones(clips, model_config.num_keypoints)
    seconds = []
    for step in range(steps + 2):
        started = time.perf_counter()
        output = model(images, torch.tensor([step]), 0)
        cmpose_loss(output, centers, weight, model_config).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def measure(neighbours: int, setting: dict[str, str], steps: int) -> float:
    """``step_seconds`` in a fresh process, since libgomp reads its settings once."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.busy_machine", "--step", str(steps)],
            env=environment | setting,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return float(done.stdout)


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=0, help="only time so many steps, and print")
    parser.add_argument("--steps", type=int, default=15, help="of each figure")
    args = parser.parse_args()
    if args.step:
        print(step_seconds(args.step))
        return
    heads = " | ".join(f"beside {n} busy processes" if n else "alone" for n in NEIGHBOURS)
    print(f"| how long threads spin | {heads} |\n|---|{'---|' * len(NEIGHBOURS)}")
    for name, setting in SETTINGS.items():
        cells = [f"{measure(n, setting, args.steps):.2f} s" for n in NEIGHBOURS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
