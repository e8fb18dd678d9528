"""Takes training steps on a run's state, and finds the first that was not finite."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cmpose.memory import is_out_of_memory
from cmpose.models.weights import checkpoint
from cmpose.train.batches import step_inputs
from cmpose.train.schedule import learning_rate, steps_per_epoch
from cmpose.train.state import TrainingState
from cmpose.train.step import (
    WARM_UP,
    CapturedStep,
    FiniteWatch,
    LossModule,
    StepOutput,
    TrainingStep,
    capture_on,
    prepare_groups,
    set_rates,
)


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message names step, terms and state."""


class Trainer:
    """Takes one step after another.

    Attributes:
        state: of the run.
        steps_per_epoch: whole batches in a pass over the clips.
        look_every: steps between two calls of :meth:`check_finite`. With loss scaling a failed
            step changes the weights, so that each is looked at.
    """

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        config, world, scaler = state.config, state.world, state.scaler
        self.steps_per_epoch = steps_per_epoch(len(state.clips), config.train)
        self.look_every = 1 if scaler.is_enabled() else config.train.log_every
        self._watch = FiniteWatch(world.device)
        self._clips_of_step: dict[int, list[int]] = {}
        self._taken = 0
        self._run: Callable[[dict[str, Tensor]], StepOutput] = self._step()
        if state.captured:
            self._run = CapturedStep(self._run, capture_on(world.device))

    def _step(self) -> TrainingStep:
        s = self.state
        return TrainingStep(
            s.losses, s.model, s.optimizer, s.scaler, self._watch, s.config, s.world
        )

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.state.config.train.epochs

    def step(self, batch: dict[str, Tensor]) -> StepOutput:
        """One optimiser step on a batch of the loader; the host reads nothing of its results."""
        state = self.state
        inputs = step_inputs(
            batch, state.step, state.model.heatmap_size, state.config, state.world.device
        )
        set_rates(
            state.optimizer, learning_rate(state.step, self.steps_per_epoch, state.config.train)
        )
        self._clips_of_step[state.step] = batch["index"].tolist()
        try:
            output = self._run(inputs)
        except RuntimeError as error:
            if not self._may_fall_back or is_out_of_memory(error):
                raise
            self._fall_back(error)
            output = self._run(inputs)
        state.step += 1
        self._taken += 1
        return output

    @property
    def _may_fall_back(self) -> bool:
        """Whether the step is being compiled or captured, which changes no weight when it fails."""
        first = self.state.config.train.speed in ("compile", "graph") and self._taken <= WARM_UP
        return first and self.state.world.size == 1

    def _fall_back(self, error: RuntimeError) -> None:
        """Goes on without what failed: compiling, or capturing."""
        state = self.state
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(
            f"train.speed={state.config.train.speed} failed ({reason:.300}); training goes on with "
            "train.speed=eager",
            file=sys.stderr,
        )
        train = replace(state.config.train, speed="eager")
        state.config = replace(state.config, train=train)
        state.losses = LossModule(state.model).train()
        state.optimizer.zero_grad(set_to_none=True)
        prepare_groups(state.optimizer, state.world.device, state.captured)
        self._run = self._step()

    def check_finite(self, checkpoints: Path) -> None:
        """Looks at the steps since the last call; waits for the device.

        Raises:
            NonFiniteLoss: one of them was not finite. The state before that step, which the halted
                optimiser has kept, is saved in ``checkpoints``.
        """
        failure = self._watch.read()
        clips_of_step, self._clips_of_step = self._clips_of_step, {}
        if failure is None:
            return
        step, values, norm = failure
        self.state.step = step
        indices = [i for part in self.state.world.gather(clips_of_step[step]) for i in part]
        name = f"nonfinite-{checkpoint.name_of(step)}"
        path = self.state.save(checkpoints, name, clips=indices)
        terms = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        raise NonFiniteLoss(
            f"step {step}: not finite ({terms}, gradient norm {norm:.6g}); the state "
            f"before this step and the indices of its clips are in {path}. Lower train.lr, set "
            "train.clip_norm, or train.precision=fp32; then resume from the last checkpoint"
        )
