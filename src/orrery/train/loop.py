"""The loop, one for every task, on a CPU or one GPU.

fp32 master weights (bf16 autocast on a GPU), EMA, clipping, steps skipped on a non-finite loss or gradient, validation,
and checkpoints that hold everything the next step depends on, so that a run killed at any moment and started again
arrives at the same weights, bit for bit (on one machine with one number of threads).
"""

import copy
import json
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from orrery.errors import InputError, note
from orrery.nn.compiling import compiler_problem
from orrery.nn.kernels import using
from orrery.train.checkpoint import CheckpointFolder, write_text
from orrery.train.export import commit
from orrery.train.networks import compile_regions, compiles
from orrery.train.optim import EMA, Optimizers, schedule
from orrery.train.recipe import Recipe, changed_keys, parse_recipe, recipe_json
from orrery.train.report import Report, duration

PATIENCE = 50  # skipped steps in a row after which a run gives up


class Randomness:
    """Every random number of a run comes from these two generators, both on the CPU, both in the checkpoint."""

    def __init__(self, seed: int) -> None:
        self.torch = torch.Generator().manual_seed(seed)
        self.numpy = np.random.default_rng(seed)

    def state(self) -> dict[str, Any]:
        """Also holds torch's global state, for a network that draws from it."""
        return {
            "torch": self.torch.get_state(),
            "numpy": json.dumps(self.numpy.bit_generator.state),
            "global": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.torch.set_state(state["torch"])
        self.numpy.bit_generator.state = json.loads(state["numpy"])
        torch.set_rng_state(state["global"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


class Task(Protocol):
    """What is trained: the loop knows nothing else about it."""

    model: nn.Module
    clips: int  # clips a step

    def plain(self, name: str) -> bool:
        """Whether the matrix of this name belongs to AdamW even in a Muon run."""
        ...

    def batch(self) -> Any:
        """The next batch; draws every random number of the step."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and numbers to log. Runs under autocast on a GPU."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out numbers; leaves the run's random state alone."""
        ...

    def sheet(self, model: nn.Module, path: Path) -> None:
        """A contact sheet (PNG) of what the model does now."""
        ...

    def export(self, model: nn.Module, directory: Path, training: dict[str, Any]) -> None:
        """Write the model to a directory, with `training` in its config."""
        ...

    def state(self) -> dict[str, Any]:
        """The data position."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        ...


def pick_device(wanted: str) -> torch.device:
    """The recipe's device; `auto` is a GPU where there is one.

    Raises:
        InputError: cuda wanted and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but torch sees no CUDA device; allowed here: 'cpu', 'auto'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


class Trainer:
    """One run of a recipe in its run directory; continues from the newest checkpoint there.

    Args:
        recipe: checked recipe. task: what it trains. random: the generators that the task draws from.
        device: where the task's model lives.

    Raises:
        InputError: the run directory belongs to a run of another recipe.
    """

    def __init__(self, recipe: Recipe, task: Task, random: Randomness, device: torch.device) -> None:
        self.recipe, self.task, self.random, self.device = recipe, task, random, device
        self.folder = recipe.out
        self.optimizers = Optimizers(task.model, task.plain, recipe.optimizer, recipe.steps, self.bf16)
        self.ema = EMA(task.model, copy.deepcopy(task.model), recipe.optimizer.ema)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", recipe.checkpoint.keep)
        self.step = self.skipped = self._skipped_in_a_row = 0
        self.seconds = 0.0  # spent in all sessions of this run
        self._stop: str | None = None
        self.interrupted = False  # by SIGINT or SIGTERM
        latest = self.checkpoints.latest()
        if latest is not None:
            self._load(latest)
        self.compiled = compiles(recipe.compile, device)
        if self.compiled:
            compile_regions(task.model)
        elif recipe.compile:
            note(f"compile = true {compiler_problem(device)}: steps run uncompiled, and slower")

    def _load(self, path: Path) -> None:
        state = CheckpointFolder.load(path)
        begun = recipe_json(parse_recipe(json.loads(state["recipe"]), str(path)))
        for key, before, after in changed_keys(begun, recipe_json(self.recipe)):
            raise InputError(
                f"{self.folder} was begun with {key} = {before!r}, the recipe now says {after!r}; "
                "set it back, or give another run directory (--set out=...)"
            )
        self.task.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizers.load_state(state["optimizers"])
        self.random.load_state(state["random"])
        self.task.load_state(state["task"])
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]

    def save(self) -> Path:
        """Write a checkpoint of now."""
        state = {
            "format": 1,
            "step": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "recipe": json.dumps(recipe_json(self.recipe)),
            "model": self.task.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizers": self.optimizers.state(),
            "random": self.random.state(),
            "task": self.task.state(),
        }
        return self.checkpoints.save(self.step, state)

    def export(self, directory: Path, recipe_name: str) -> None:
        """Write the EMA weights, as the task's model directory, with where they come from."""
        training = {"recipe": recipe_name, "step": self.step, "steps": self.recipe.steps, "seed": self.recipe.seed}
        training |= {"clips_seen": self.step * self.task.clips, "seconds": round(self.seconds), "skipped": self.skipped}
        training |= {"torch": torch.__version__, "commit": commit()}
        self.task.export(self.ema.model, directory, training)

    @property
    def bf16(self) -> bool:
        """Whether steps run under bf16 autocast (worth it on a GPU, and on a CPU that has bf16 instructions)."""
        return self.recipe.precision == "bf16" or (self.recipe.precision == "auto" and self.device.type == "cuda")

    def train_step(self) -> tuple[bool, dict[str, Tensor | float]]:
        """One step: batch, loss, gradient, update. Returns (whether the weights moved, numbers to log)."""
        batch = self.task.batch()
        with self._arithmetic():
            loss, values = self.task.loss(self.task.model, batch)
        loss.backward()
        moved, norm = self.optimizers.step(self.step, loss)
        if moved:
            self.ema.update()
            self._skipped_in_a_row = 0
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= PATIENCE:
                raise RuntimeError(
                    f"loss or gradient was not finite {PATIENCE} steps in a row, at step {self.step}; lower lr"
                )
        self.step += 1
        return moved, {"loss": loss.detach(), "grad_norm": norm, **{k: v.detach() for k, v in values.items()}}

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Autocast where the recipe wants it. On a CPU attention is then plain products: the sequences are short, and
        the backward pass of SDPA's bfloat16 kernel takes many times as long there."""
        if not self.bf16:
            yield
            return
        plain = using("products", device=self.device) if self.device.type == "cpu" else nullcontext()
        with plain, torch.autocast(self.device.type, torch.bfloat16):
            yield

    def run(self, max_seconds: float | None = None) -> bool:
        """Train to the recipe's last step, or until `max_seconds` or SIGINT/SIGTERM; save and say so in each case.

        Returns:
            whether the recipe's last step is done.
        """
        write_text(self.folder / "recipe.json", json.dumps(recipe_json(self.recipe), indent=2) + "\n")
        steps = self.recipe.steps
        begin = saved = time.monotonic()
        before = self.seconds
        handlers = self._catch_signals()
        try:
            with Report(self.folder, self.step, steps, self.recipe.log.tensorboard) as report:
                report.say(self._opening())
                meter = _Meter(self.task.clips)
                while self.step < steps and self._stop is None:
                    start = time.monotonic()
                    moved, values = self.train_step()
                    now = time.monotonic()
                    self.seconds = before + now - begin
                    meter.add(values, moved, now - start)
                    report.advance(self.step)
                    last = self.step == steps
                    if max_seconds is not None and now - begin > max_seconds:
                        self._stop = f"{max_seconds:g} seconds are over"
                    if self.step % self.recipe.log.steps == 0 or last:
                        lr = self.recipe.optimizer.lr * schedule(self.step - 1, steps, self.recipe.optimizer)
                        numbers = meter.read() | {"lr": lr, "skipped": float(self.skipped)}
                        report.numbers(
                            self.step, meter.rate, self._seconds_left(meter.rate, begin, max_seconds), numbers
                        )
                    validate = self.step % self.recipe.validation.steps == 0 or last
                    if self._due(saved) or validate or self._stop is not None:
                        path = self.save()
                        saved = time.monotonic()
                        if self._stop is not None or last:
                            report.say(f"saved {path}")
                    if validate:  # after saving: a picture that cannot be written costs no step
                        self._validate(report)
                    if last:
                        seen = f"{steps:,} steps, {steps * self.task.clips:,} clips"
                        report.say(f"{self.folder}: {seen}, {duration(self.seconds)} in all")
                if self._stop is not None:
                    report.say(f"stopped at step {self.step} of {steps}: {self._stop}; the same command continues")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.step >= steps

    def _due(self, saved: float) -> bool:
        every = self.recipe.checkpoint.steps
        return time.monotonic() - saved >= self.recipe.checkpoint.seconds or (
            every is not None and self.step % every == 0
        )

    def _seconds_left(self, rate: float, begin: float, max_seconds: float | None) -> float:
        left = (self.recipe.steps - self.step) * self.task.clips / max(rate, 1e-9)
        return left if max_seconds is None else min(left, max_seconds - (time.monotonic() - begin))

    def _opening(self) -> str:
        count = sum(p.numel() for p in self.task.model.parameters())
        start = f"continues at step {self.step}" if self.step else "starts"
        precision = ("bf16 autocast" if self.bf16 else "fp32") + (", compiled" if self.compiled else "")
        return (
            f"{self.folder} {start} of {self.recipe.steps}: {count / 1e6:.2f}M parameters on {self.device}, {precision}"
        )

    def _validate(self, report: Report) -> None:
        model = self.ema.model
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            report.validation(self.step, self.task.validate(model))
            if self.recipe.validation.sheet:
                self.task.sheet(model, self.folder / "sheets" / f"step-{self.step:09d}.png")

    def _catch_signals(self) -> dict[int, Any]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop, self.interrupted = f"{signal.Signals(number).name} received", True

        try:
            return {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller's signals stay as they are
            return {}


class _Meter:
    """Means of the logged numbers since the last reading, and clips per second of the steps alone."""

    def __init__(self, clips: int) -> None:
        self.clips, self.rate = clips, 0.0
        self._values: dict[str, list[Tensor | float]] = defaultdict(list)
        self._count, self._seconds = 0, 0.0

    def add(self, values: dict[str, Tensor | float], moved: bool, seconds: float) -> None:
        self._count, self._seconds = self._count + 1, self._seconds + seconds
        if moved:
            for key, value in values.items():
                self._values[key].append(value)

    def read(self) -> dict[str, float]:
        rate = self._count * self.clips / max(self._seconds, 1e-9)
        self.rate = rate if self.rate == 0 else 0.5 * (self.rate + rate)
        means = {
            k: float(torch.stack([torch.as_tensor(v).float().cpu() for v in vs]).mean())
            for k, vs in self._values.items()
        }
        self._values.clear()
        self._count, self._seconds = 0, 0.0
        return {"loss": float("nan"), "grad_norm": float("nan")} | means
