"""What a judgement of robots looks like: success in the model over success in truth, and episodes side by side."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from orrery.eval.trials import Pair
from orrery.files import atomic_file
from orrery.sim.detect import to_pixels
from orrery.sim.simulate import FPS
from orrery.video import Video

GOAL_RADIUS = 0.07  # metres from the goal at which the environments' task is done
SCALE, GAP, HEAD = 4, 8, 28  # of clips: pixels a pixel, between the two, above them for words
INK, FAINT, GRID = (35, 38, 43), (120, 125, 133), (228, 230, 234)
POINT, BAR = (31, 98, 178), (150, 184, 224)
ENDS = {
    (True, True): "success in both",
    (False, False): "failure in both",
    (True, False): "success in the\nmodel only",
    (False, True): "success in\nMuJoCo only",
}  # (model, truth) -> words
SIDE, FRAME, SHARP = 720, (86, 64, 24, 72), 2  # of the scatter: plot's side; room left, top, right, bottom; sharpness
At = Callable[[float, float], tuple[float, float]]  # rates to pixels


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def side_by_side(pair: Pair) -> Video:
    """Model to the left, truth to the right, with the goal's ring; the one that ends first keeps its last frame."""
    length = max(len(pair.model), len(pair.truth))
    size = pair.model.shape[1] * SCALE
    frames = np.empty((length, HEAD + size, 2 * size + GAP, 3), np.uint8)
    for t in range(length):
        canvas = Image.new("RGB", (2 * size + GAP, HEAD + size), "white")
        draw = ImageDraw.Draw(canvas)
        for place, (name, film) in enumerate((("model", pair.model), ("MuJoCo", pair.truth))):
            left, over = place * (size + GAP), t >= len(film) - 1
            canvas.paste(_with_goal(film[min(t, len(film) - 1)], pair.goal), (left, HEAD))
            how = "" if not over else ": success" if pair.ends[place] else ": failure"
            draw.text((left + 6, 5), name + how, INK, _font(15))
        frames[t] = np.asarray(canvas)
    return Video(frames, FPS)


def _with_goal(image: np.ndarray, goal: np.ndarray) -> Image.Image:
    """A picture [H, W, 3] uint8 enlarged, with the goal's circle of success on the table."""
    size = image.shape[0]
    angles = np.linspace(0, 2 * np.pi, 49)
    ring = np.asarray(goal, float) + GOAL_RADIUS * np.column_stack([np.cos(angles), np.sin(angles)])
    picture = Image.fromarray(image).resize((size * SCALE, size * SCALE), Image.Resampling.BICUBIC)
    points = [(float(x), float(y)) for x, y in (to_pixels(ring, size) + 0.5) * SCALE]
    ImageDraw.Draw(picture).line(points, fill="white", width=2)
    return picture


def clip_sheet(path: Path, clips: Sequence[tuple[str, Video]], columns: int = 4) -> None:
    """A PNG with a row a clip (words to its left) that shows it at `columns` times from the first frame to the last."""
    width, height, margin, gap = clips[0][1].width // 2, clips[0][1].height // 2, 200, 8
    sheet = Image.new("RGB", (margin + columns * (width + gap), len(clips) * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (words, video) in enumerate(clips):
        top = gap + row * (height + gap)
        draw.multiline_text((10, top + HEAD // 2 + 4), words, INK, _font(14), spacing=5)
        for column, index in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
            picture = Image.fromarray(video.frames[index]).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (margin + column * (width + gap), top))
    with atomic_file(path) as partial:
        sheet.save(partial)


@dataclass(frozen=True)
class Dot:
    """A robot in the scatter: success in truth and in the model, each (rate, low, high)."""

    name: str
    truth: tuple[float, float, float]
    model: tuple[float, float, float]


def scatter(path: Path, dots: Sequence[Dot], title: str) -> None:
    """A PNG: success in MuJoCo to the right, in the model upwards, 95 % intervals, the diagonal of a perfect judge."""
    left, top, right, bottom = (SHARP * n for n in FRAME)
    side = SHARP * SIDE
    canvas = Image.new("RGB", (left + side + right, top + side + bottom), "white")
    draw = ImageDraw.Draw(canvas)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (0.03 + 0.94 * x) * side, top + side - (0.03 + 0.94 * y) * side

    _axes(canvas, draw, at, title)
    taken = []  # boxes that names should not cover
    for dot in dots:
        (x, left_end, right_end), (y, low, high) = dot.truth, dot.model
        for a, b in ((at(left_end, y), at(right_end, y)), (at(x, high), at(x, low))):
            draw.line((a, b), BAR, 2 * SHARP)
            taken.append((a[0] - SHARP, a[1] - SHARP, b[0] + SHARP, b[1] + SHARP))
    spots = [at(dot.truth[0], dot.model[0]) for dot in dots]
    radius = 6 * SHARP
    for x, y in spots:
        draw.ellipse(ball := (x - radius, y - radius, x + radius, y + radius), POINT, "white", SHARP)
        taken.append(ball)
    _names(draw, [dot.name for dot in dots], spots, taken, (left, top, left + side, top + side))
    with atomic_file(path) as partial:
        canvas.resize((canvas.width // SHARP, canvas.height // SHARP), Image.Resampling.LANCZOS).save(partial)


def _axes(canvas: Image.Image, draw: ImageDraw.ImageDraw, at: At, title: str) -> None:
    """Title, grid, labels and diagonal; `at` maps rates to pixels."""
    left, top, _, _ = (SHARP * n for n in FRAME)
    side = SHARP * SIDE
    small, plain, large = (_font(SHARP * n) for n in (15, 17, 20))
    for tenth in range(0, 11, 2):
        x, y = at(tenth / 10, tenth / 10)
        draw.line((x, top, x, top + side), GRID, SHARP)
        draw.line((left, y, left + side, y), GRID, SHARP)
        draw.text((x, top + side + 8 * SHARP), f"{tenth * 10} %", FAINT, small, anchor="mt")
        draw.text((left - 8 * SHARP, y), f"{tenth * 10} %", FAINT, small, anchor="rm")
    ends = np.array([at(0, 0), at(1, 1)])
    dashes = np.linspace(0, 1, 81)
    for a, b in zip(dashes[::2], dashes[1::2]):
        draw.line([tuple(ends[0] + t * (ends[1] - ends[0])) for t in (a, b)], FAINT, SHARP)
    draw.rectangle((left, top, left + side, top + side), outline=FAINT, width=SHARP)
    draw.text((left, top // 2), title, INK, large, anchor="lm")
    under = top + side + 48 * SHARP
    draw.text((left + side / 2, under), "success in MuJoCo", INK, plain, anchor="mm")
    words = Image.new("RGB", (side, 30 * SHARP), "white")
    ImageDraw.Draw(words).text((side / 2, 15 * SHARP), "success in the model", INK, plain, anchor="mm")
    canvas.paste(words.rotate(90, expand=True), (2 * SHARP, top))


def _names(
    draw: ImageDraw.ImageDraw,
    names: Sequence[str],
    spots: Sequence[tuple[float, float]],
    taken: list[tuple[float, float, float, float]],
    inside: tuple[float, float, float, float],
) -> None:
    """Writes each name beside its spot where it covers least of what is `taken`; a line leads to one that had to go
    further away."""
    font, near = _font(SHARP * 15), 11 * SHARP
    for name, (x, y) in sorted(zip(names, spots), key=lambda each: each[1]):
        box = draw.textbbox((0, 0), name, font)
        width, height = box[2] - box[0], box[3] - box[1]
        best: tuple[float, float, tuple[float, float, float, float]] | None = None
        for distance in (near, 2 * near, 3.5 * near, 5 * near, 7 * near):
            for turn in range(16):
                angle = turn * math.pi / 8
                cx = x + math.cos(angle) * (distance + width / 2)
                cy = y + math.sin(angle) * (distance + height / 2)
                spot = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                outside = spot[0] < inside[0] or spot[1] < inside[1] or spot[2] > inside[2] or spot[3] > inside[3]
                cost = sum(_overlap(spot, other) for other in taken) + 1e9 * outside + distance + 0.1 * turn
                if best is None or cost < best[0]:
                    best = cost, distance, spot
        assert best is not None
        _, distance, spot = best
        if distance > near:
            end = min(max(x, spot[0]), spot[2]), min(max(y, spot[1]), spot[3])
            draw.line((x, y, *end), FAINT, SHARP)
        draw.text((spot[0] - box[0], spot[1] - box[1]), name, INK, font)
        taken.append(spot)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two boxes (left, top, right, bottom) share, square pixels."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
