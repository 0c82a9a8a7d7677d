"""The page of `orrery play` in a real Chromium without a screen, served by the real command."""

import base64
import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import orrery
from orrery.env.game import packaged_picture
from orrery.sim.detect import detect
from orrery.video import Video

api = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
TABLETOP = Path(orrery.__file__).parent / "weights" / "tabletop"
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: `make browser`")


@pytest.fixture(scope="module")
def address(acting_folder: Path) -> Iterator[str]:
    """`orrery play` with the model in the package, or a tiny one of random weights where there is none."""
    model = TABLETOP if (TABLETOP / "config.json").exists() else acting_folder
    words = ["play", "--port", "0", "--no-browser", "--model", str(model)]
    code = f"from orrery.cli.main import main; main({words!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        printed = "".join(iter(process.stdout.readline, "Ctrl-C ends it.\n"))
        found = re.search(r"http://127\.0\.0\.1:\d+/", printed)
        assert found, printed
        yield found.group()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., "Page"]]:
    """open_page(viewport): the page, ready. A complaint of its console, or a request elsewhere, fails the test."""
    pages = []

    def build(viewport: dict[str, int] = DESK, **options: Any) -> "Page":
        pages.append(Page(browser.new_page(viewport=viewport, **options), address))
        return pages[-1]

    yield build
    for page in pages:
        page.tab.close()
        assert not page.complaints and all(url.startswith((address, "blob:")) for url in page.asked), vars(page)


class Page:
    """The page, and what it shows."""

    def __init__(self, tab: Any, address: str) -> None:
        self.tab, self.complaints, self.asked = tab, [], []
        tab.on("console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.goto(address)
        self.wait("document.body.dataset.state === 'ready'")

    def wait(self, condition: str) -> None:
        """Until a condition holds in the page (its policy forbids Playwright's own waiting, which is an `eval`)."""
        end = time.monotonic() + 60
        while not self.tab.evaluate(condition):
            assert time.monotonic() < end, f"{condition} does not come true; the page says {self.message()!r}"
            time.sleep(0.02)

    def steps(self, count: int) -> None:
        """Until so many steps more have come, and are shown."""
        now = self.tab.evaluate("Number(document.body.dataset.steps)")
        self.wait(f"Number(document.body.dataset.steps) >= {now + count}")

    def place(self, what: str, world: str = "truth") -> np.ndarray:
        """Where the page says that the peg or the cube of a world is, metres."""
        said = self.tab.get_attribute(f"[data-world={world}]", f"data-{what}")
        return np.array([float(number) for number in said.split(",")])

    def picture(self, world: str = "truth") -> np.ndarray:
        """What is seen on a canvas [64, 64, 3] uint8: out of a screenshot."""
        shot = self.tab.locator(f"[data-world={world}] canvas").screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB").resize((64, 64), Image.Resampling.BOX))

    def moment(self, world: str = "truth") -> tuple[np.ndarray, np.ndarray]:
        """A canvas [64, 64, 3] uint8 and where the page says that the peg is, both of the same frame: the arm sways."""
        script = "f => [f.querySelector('canvas').toDataURL(), f.dataset.peg]"
        url, said = self.tab.eval_on_selector(f"[data-world={world}]", script)
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        pixels = np.asarray(image.resize((64, 64), Image.Resampling.BOX))
        return pixels, np.array([float(number) for number in said.split(",")])

    def message(self) -> str:
        return str(self.tab.inner_text("#message"))


def test_begins_with_the_picture_of_the_seed_and_stands_still(open_page: Callable[..., Page]) -> None:
    page = open_page()
    for world in ("model", "truth"):
        assert np.abs(page.picture(world)[8:-8, 8:-8].astype(int) - packaged_picture(0)[8:-8, 8:-8]).mean() < 6
    assert "Press an arrow key" in page.message() and "22 cm" in page.tab.inner_text("[data-world=truth]")
    time.sleep(1)
    assert page.tab.get_attribute("body", "data-steps") == "0"


@pytest.mark.parametrize(
    ("key", "axis", "sign"), [("ArrowLeft", 0, -1), ("d", 0, 1), ("ArrowUp", 1, 1), ("ArrowDown", 1, -1)]
)
def test_keys_move_the_peg_their_way(open_page: Callable[..., Page], key: str, axis: int, sign: int) -> None:
    page = open_page()
    if key == "d":  # the peg begins far to the right
        page.tab.keyboard.down("a")
        page.steps(4)
        page.tab.keyboard.up("a")
        page.steps(3)
    before = {world: page.picture(world) for world in ("model", "truth")}
    peg = page.place("peg")
    page.tab.keyboard.down(key)
    page.steps(2)
    assert page.tab.locator("[data-move].lit").count() == 1
    page.tab.keyboard.up(key)
    page.steps(4)  # until it stands
    assert (page.place("peg") - peg)[axis] * sign > 0.1
    for world, picture in before.items():
        assert (np.abs(page.picture(world).astype(int) - picture) > 20).any(), world
    pixels, said = page.moment()
    assert np.linalg.norm(detect(pixels).peg - said) < 0.04


def test_slower_with_shift(open_page: Callable[..., Page]) -> None:
    page, ways = open_page(), []
    for keys in (["ArrowUp"], ["Shift", "ArrowUp"]):
        page.tab.keyboard.press("r")
        page.wait("document.body.dataset.state === 'ready'")
        before = page.place("peg")
        for key in keys:
            page.tab.keyboard.down(key)
        page.steps(3)
        ways.append(np.linalg.norm(page.place("peg") - before))
        for key in keys:
            page.tab.keyboard.up(key)
    assert ways[1] < 0.7 * ways[0]


def test_the_peg_follows_a_pointer(open_page: Callable[..., Page]) -> None:
    page = open_page()
    before = page.place("peg")
    box = page.tab.locator("[data-world=truth] canvas").bounding_box()
    page.tab.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.6 * box["height"])
    page.tab.mouse.down()
    page.steps(7)
    page.tab.mouse.up()
    after = page.place("peg")
    assert after[0] < before[0] - 0.4 and after[0] < -0.2


def test_reset_next_and_seed(open_page: Callable[..., Page]) -> None:
    page = open_page()
    start = page.picture()
    page.tab.keyboard.down("ArrowUp")
    page.steps(2)
    page.tab.keyboard.up("ArrowUp")
    page.tab.click("#reset")
    page.wait("document.body.dataset.steps === '0'")
    page.wait("document.body.dataset.state === 'ready'")
    time.sleep(0.2)
    assert np.abs(page.picture().astype(int) - start).max() < 3
    page.tab.keyboard.press("n")
    page.wait("document.querySelector('#seed').value === '1'")
    time.sleep(0.4)
    assert np.abs(page.picture()[8:-8, 8:-8].astype(int) - packaged_picture(1)[8:-8, 8:-8]).mean() < 6
    page.tab.fill("#seed", "12")
    page.tab.press("#seed", "Enter")
    page.wait("document.querySelector('[data-world=truth]').dataset.cube")
    time.sleep(0.6)
    assert np.abs(page.picture()[8:-8, 8:-8].astype(int) - packaged_picture(12)[8:-8, 8:-8]).mean() < 6
    page.tab.fill("#seed", "-3")
    page.tab.press("#seed", "Enter")
    assert "allowed is 0 to 2147483647" in page.message()


def test_pause_stands_still_and_goes_on(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.tab.keyboard.press(" ")
    page.steps(1)
    page.tab.keyboard.press(" ")
    assert page.tab.get_attribute("body", "data-state") == "paused" and page.message() == "Paused."
    assert page.tab.get_attribute("#pause", "aria-pressed") == "true"
    time.sleep(1)
    still = page.tab.get_attribute("body", "data-steps")
    time.sleep(0.7)
    assert page.tab.get_attribute("body", "data-steps") == still
    page.tab.click("#pause")
    page.steps(2)


def test_saves_a_video(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    page.tab.keyboard.down("ArrowLeft")
    page.steps(3)
    page.tab.keyboard.up("ArrowLeft")
    with page.tab.expect_download() as waiting:
        page.tab.keyboard.press("v")
    assert waiting.value.suggested_filename == "orrery-seed0.mp4"
    waiting.value.save_as(tmp_path / "play.mp4")
    video = Video.read(tmp_path / "play.mp4")
    assert len(video) >= 1 + 3 * 4 and (video.height, video.width) == (256, 512)


def test_own_pictures(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    Image.fromarray(packaged_picture(9)).resize((256, 256)).save(tmp_path / "table.png")
    page.tab.set_input_files("#picture", tmp_path / "table.png")
    page.wait("document.querySelector('#message').textContent.startsWith('Press')")
    time.sleep(0.4)
    assert np.abs(page.picture("model")[8:-8, 8:-8].astype(int) - packaged_picture(9)[8:-8, 8:-8]).mean() < 8
    page.tab.set_input_files("#picture", {"name": "a.png", "mimeType": "image/png", "buffer": b"nothing"})
    page.wait("document.querySelector('#message').textContent.includes('not an image')")
    page.tab.keyboard.press("r")
    page.wait("document.body.dataset.state === 'ready'")
    page.tab.keyboard.down("ArrowUp")
    page.steps(1)


def test_fits_a_phone_and_its_thumbs(open_page: Callable[..., Page]) -> None:
    page = open_page(PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert page.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for world in ("model", "truth"):
        box = page.tab.locator(f"[data-world={world}] canvas").bounding_box()
        assert box["width"] > 160 and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    before = page.place("peg")
    box = page.tab.locator("[data-move=left]").bounding_box()
    assert min(box["width"], box["height"]) >= 44
    page.tab.mouse.move(box["x"] + 20, box["y"] + 20)
    page.tab.mouse.down()
    page.steps(3)
    page.tab.mouse.up()
    assert page.place("peg")[0] < before[0] - 0.1


def test_every_control_has_a_name_and_the_keyboard_reaches_it(open_page: Callable[..., Page]) -> None:
    page, reached = open_page(), set()
    for _ in range(20):
        page.tab.keyboard.press("Tab")
        reached.add(page.tab.evaluate("document.activeElement.id || document.activeElement.dataset.move || ''"))
    assert {"reset", "next", "pause", "goal", "save", "open", "seed", "up", "left", "down", "right"} <= reached
    for button in page.tab.locator("button").all():
        assert (button.get_attribute("aria-label") or button.inner_text()).strip()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_by_day_and_by_night(open_page: Callable[..., Page], scheme: str) -> None:
    """WCAG's contrast of 4.5 for every colour of text."""
    page = open_page(color_scheme=scheme)
    script = "s => getComputedStyle(document.querySelector(s))"

    def luminance(colour: str) -> float:
        levels = np.array([float(number) for number in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    ground = luminance(page.tab.evaluate(f"({script})('body').backgroundColor"))
    assert (ground > 0.5) == (scheme == "light")
    for selector in ("h1", "#task", "#message", "figcaption span", ".distance", ".goals", "footer", "label"):
        text = luminance(page.tab.evaluate(f"({script})({selector!r}).color"))
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) > 4.5, selector
