"""What a run says while it works: a progress bar (plain lines where there is no terminal), log.jsonl, TensorBoard."""

import json
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from orrery.errors import InputError
from orrery.train.checkpoint import write_text


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Report(AbstractContextManager["Report"]):
    """Progress, log and TensorBoard of one run.

    Args:
        folder: run directory; log.jsonl is appended to. Records of `step` and later are dropped first, because a killed
            run had logged steps that its last checkpoint does not know.
        step: where the run starts. steps: where it ends.
        tensorboard: also write TensorBoard event files to folder/tensorboard.

    Raises:
        InputError: tensorboard asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, steps: int, tensorboard: bool = False) -> None:
        self.step, self.steps = step, steps
        self.path = Path(folder) / "log.jsonl"
        self.tty = sys.stderr.isatty()
        self._writer: Any = None
        self._bar: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("log.tensorboard = true needs tensorboard: pip install 'orrery[train]'") from None
            self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step)
        if self.path.exists():
            self._forget(step)
        self._file = open(self.path, "a", encoding="utf-8")
        self._last_line = 0.0

    def _forget(self, step: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept: list[str] = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        write_text(self.path, "".join(line + "\n" for line in kept))

    def __enter__(self) -> "Report":
        if self.tty:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("training", total=self.steps, completed=self.step, text="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()
        self._file.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def numbers(self, step: int, rate: float, left: float, values: dict[str, float]) -> None:
        """Log training numbers: `rate` in clips/s, `left` in seconds."""
        self._record(step, {"clips_per_second": round(rate, 3), **values})
        text = f"loss {values['loss']:.4f}  {rate:.1f} clips/s  ETA {duration(left)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._last_line > 10 or step >= self.steps:
            self._last_line = time.monotonic()
            text += f"  grad {values['grad_norm']:.3g}  lr {values['lr']:.2e}"
            print(f"step {step}/{self.steps}  {text}", file=sys.stderr, flush=True)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Log held-out numbers."""
        self._record(step, {f"val/{key}": value for key, value in values.items()})
        self.say(f"step {step}  held out: " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))

    def say(self, text: str) -> None:
        """One line for the reader, beside the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _record(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 1), **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)
