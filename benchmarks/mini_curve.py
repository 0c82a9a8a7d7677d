"""What more training would give: `python benchmarks/mini_curve.py [--vae LOG] [--dit LOG]`.

Reads the held-out lines of the two training logs (runs/*/log.jsonl, or the copies kept in results/), fits a straight
line in log-log to the second half of each curve, and writes results/mini_curve.png and .md. The fit is a guess about
the same recipe run longer; the learning rate decays to zero within a run, which flatters its end.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from orrery.files import atomic_file

HERE = Path(__file__).parent / "results"


def held_out(path: Path, key: str, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(clips seen, value) of every held-out line of a log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {line["step"]: line[key] for line in lines if key in line}
    if len(rows) < 4:
        raise SystemExit(f"{path} holds {len(rows)} lines with {key}; needed are 4")
    steps = np.array(sorted(rows))
    return steps * batch, np.array([rows[step] for step in steps])


def power_law(clips: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(a, b) of values = a clips^b, fitted to the second half of the curve."""
    half = len(clips) // 2
    b, a = np.polyfit(np.log(clips[half:]), np.log(values[half:]), 1)
    return float(np.exp(a)), float(b)


def main() -> None:
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, default=HERE / "mini_vae_log.jsonl")
    parser.add_argument("--dit", type=Path, default=HERE / "mini_dit_log.jsonl")
    parser.add_argument("--vae-batch", type=int, default=4)
    parser.add_argument("--dit-batch", type=int, default=32)
    options = parser.parse_args()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    text = [
        f"Command: `python {shlex.join(sys.argv)}`. Held-out clips; the fit is over the second half of each run.",
        "",
    ]
    text += [
        "| | clips seen | value | per doubling | twice the clips | eight times |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    curves = (
        ("VAE, mean squared error", options.vae, "val/psnr", options.vae_batch),
        ("transformer, velocity loss", options.dit, "val/loss", options.dit_batch),
    )
    for axis, (name, path, key, batch) in zip(axes, curves, strict=True):
        clips, values = held_out(path, key, batch)
        errors = 10 ** (-values / 10) if key == "val/psnr" else values
        a, b = power_law(clips, errors)
        ahead = np.array([clips[-1] * 2, clips[-1] * 8])
        axis.loglog(clips, errors, "o-", ms=3, label="held out")
        more = np.geomspace(clips[len(clips) // 2], ahead[-1], 30)
        axis.loglog(more, a * more**b, "--", lw=1, label="fit")
        axis.set(title=name, xlabel="clips seen")
        axis.grid(alpha=0.3, which="both")
        axis.legend()

        def show(error: float, key: str = key) -> str:
            return f"{-10 * np.log10(error):.1f} dB" if key == "val/psnr" else f"{error:.3f}"

        guesses = [show(a * clip**b) for clip in ahead]
        text.append(f"| {name} | {clips[-1]:,} | {show(errors[-1])} | x {2**b:.3f} | {guesses[0]} | {guesses[1]} |")
    with atomic_file(HERE / "mini_curve.png") as partial:
        figure.savefig(partial, dpi=110)
    with atomic_file(HERE / "mini_curve.md") as partial:
        partial.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
