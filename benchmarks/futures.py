"""Several samples of one future: is a prediction wrong, or is what happens open? Used by mini_quality.py."""

from typing import Any

import numpy as np
from common import table

LEGEND = (
    "Of each clip several samples were drawn. `one`: the mean over samples; `nearest`: of the one that is nearest to "
    "the others; `best`: of the one that is nearest to the truth. Where `one` is far above `nearest`, what happens is "
    "open, to the model at least; where `best` is high too, it does not know it."
)


def last_radii(row: dict[str, Any]) -> list[float]:
    """Centroid errors at the last frame, in radii of the true things, of those that truth shows there."""
    pairs = zip(row["error_px"], row["radius_px"], strict=True)
    return [error[-1] / radius[-1] for error, radius in pairs if error[-1] is not None]


def spread_of(videos: list[np.ndarray], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the samples of one clip say. videos: the generated frames, uint8 [T, H, W, 3]; rows: `psnr` by frame,
    `error_px` and `radius_px` by thing and frame, of each. nearest: which one has the least mean squared difference to
    the others."""
    pixels = [video.astype(np.float32) for video in videos]
    apart = [sum(float(np.mean((a - b) ** 2)) for b in pixels) for a in pixels]
    return {
        "radii": [last_radii(row) for row in rows],
        "psnr": [float(np.mean(row["psnr"])) for row in rows],
        "nearest": int(np.argmin(apart)),
    }


def summarise_futures(found: list[dict[str, Any]]) -> dict[str, float]:
    """Means over clips: of all samples, of the one nearest to the others, of the best by each measure."""
    found = [each for each in found if each["radii"][0]]
    if not found:
        return {}
    means = [np.array(each["radii"]).mean(axis=1) for each in found]
    out: dict[str, float] = {"clips": len(found), "samples": len(means[0])}
    for key, rows, best in (("radii", means, np.min), ("psnr", [np.array(e["psnr"]) for e in found], np.max)):
        out[key] = float(np.mean(rows))
        out[f"{key}_nearest"] = float(np.mean([row[e["nearest"]] for row, e in zip(rows, found, strict=True)]))
        out[f"{key}_best"] = float(np.mean([best(row) for row in rows]))
    return out


def futures_lines(summary: dict[str, Any]) -> list[str]:
    """The table, with a row a group of clips."""
    rows = {group: methods["futures"] for group, methods in summary.items() if methods.get("futures")}
    if not rows:
        return []
    count = next(iter(rows.values()))["samples"]
    lines = ["", f"## {count} futures of two latents", "", LEGEND, ""]
    heads = ["clips", "n", *(f"{what}, {which}" for what in ("radii", "PSNR") for which in ("one", "nearest", "best"))]
    keys = [f"{what}{which}" for what in ("radii", "psnr") for which in ("", "_nearest", "_best")]
    cells = [[group, str(row["clips"]), *(f"{row[key]:.2f}" for key in keys)] for group, row in rows.items()]
    return lines + table(heads, cells)
