"""Runs a study's runs, several at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from cmpose.config import Config
from cmpose.files import Interrupted, end_with_parent, stop_requests
from cmpose.study.grid import Study, run_name
from cmpose.study.runs import finished_results, run_config, run_one, training_folder

GRACE = 40.0
"""Seconds before the limit at which runs are told to stop: to finish a step and save."""

_FINISHED, _STOPPED = "finished", "stopped"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_process(
    sender: Connection, config: Config, folder: Path, name: str, seed: int, threads: int
) -> None:
    """A run in a process of its own; what it prints goes into its training folder."""
    end_with_parent()
    trained = training_folder(folder, name, seed)
    trained.mkdir(parents=True, exist_ok=True)
    try:
        with (trained / "output.txt").open("a") as text, contextlib.redirect_stdout(text):
            run_one(config, folder, name, seed, threads)
    except (Interrupted, KeyboardInterrupt):
        sender.send(_STOPPED)
    except (ValueError, OSError, RuntimeError) as error:  # the message says all
        sender.send(f"{type(error).__name__}: {error}")
    except Exception:
        sender.send(traceback.format_exc())
    else:
        sender.send(_FINISHED)


@dataclass
class _Worker:
    run: tuple[str, int]
    process: BaseProcess
    receiver: Connection

    def outcome(self) -> str:
        """What an ended process sent; empty if it ended before it could."""
        try:
            return self.receiver.recv() if self.receiver.poll() else ""
        except EOFError:
            return ""


class RunPool:
    """Takes the runs of a study that are not finished, ``jobs`` of them at a time.

    Args:
        study: says which runs there are.
        folder: the study's.
        jobs: runs at a time; each gets its share of the cores.
        progress: shows a bar.
    """

    def __init__(self, study: Study, folder: Path, jobs: int, progress: bool) -> None:
        self.study, self.folder, self.jobs, self.progress = study, folder, jobs, progress
        self.settings = study.settings()
        self.threads = max(1, cores() // jobs)
        self.workers: list[_Worker] = []

    def work(self, stop_at: float) -> bool:
        """Starts runs and waits for them; whether all are finished.

        Args:
            stop_at: ``time.perf_counter()`` at which the runs under way are told to save.

        Raises:
            Interrupted: on SIGINT or SIGTERM, when the runs under way have been saved.
            RuntimeError: a run failed; the others have been saved.
        """
        done = {(r["name"], r["seed"]) for r in finished_results(self.study, self.folder)}
        waiting = [run for run in self.study.runs() if run not in done]
        bar = tqdm(
            total=len(waiting) + len(done),
            initial=len(done),
            unit="run",
            desc="ablate",
            smoothing=0.1,
            disable=None if self.progress else True,
        )
        shown = ""
        with stop_requests() as stop:
            try:
                while (waiting or self.workers) and not stop.is_set():
                    if time.perf_counter() > stop_at:
                        break
                    while waiting and len(self.workers) < self.jobs:
                        self._start(waiting.pop(0))
                    running = ", ".join(run_name(*worker.run) for worker in self.workers)
                    if running != shown:
                        shown = running
                        bar.set_postfix_str(shown)
                    bar.update(self._collect(wait=0.5))
            finally:
                self._stop()
                bar.close()
        finished, total = len(finished_results(self.study, self.folder)), len(self.study.runs())
        if stop.is_set() and finished < total:
            raise Interrupted(
                f"stopped; {finished} of {total} runs are finished and those under way are saved: "
                "the same command goes on"
            )
        return finished == total

    def _start(self, run: tuple[str, int]) -> None:
        # Spawned, because a forked process cannot use CUDA.
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        name, seed = run
        config = run_config(self.study.recipe, self.settings[name], seed)
        process = context.Process(
            target=_in_process, args=(sender, config, self.folder, name, seed, self.threads)
        )
        process.start()
        sender.close()
        self.workers.append(_Worker(run, process, receiver))

    def _collect(self, wait: float) -> int:
        """Takes the runs that have ended within ``wait`` seconds; how many are finished.

        Raises:
            RuntimeError: naming a run that failed, and why.
        """
        multiprocessing.connection.wait([w.process.sentinel for w in self.workers], wait)
        finished = 0
        for worker in [w for w in self.workers if not w.process.is_alive()]:
            self.workers.remove(worker)
            outcome = worker.outcome()
            if outcome == _FINISHED:
                finished += 1
            elif outcome != _STOPPED:
                reason = outcome or f"its process ended with exit code {worker.process.exitcode}"
                raise RuntimeError(
                    f"run {run_name(*worker.run)} failed: {reason} (what it printed: "
                    f"{training_folder(self.folder, *worker.run) / 'output.txt'}); "
                    "the same command goes on from its last checkpoint"
                )
        return finished

    def _stop(self) -> None:
        """Lets the runs under way save, and ends those that take longer than ``GRACE``."""
        for worker in self.workers:
            worker.process.terminate()
        until = time.perf_counter() + GRACE
        for worker in self.workers:
            worker.process.join(max(0.0, until - time.perf_counter()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers.clear()
