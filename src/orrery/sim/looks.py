"""The two looks of every world: `plain` (flat colours, even light) and `real` (textures, warm light, a noisy camera).

A look never touches the physics: one seed moves the same in both, so pairs for Sim2Real are made by asking twice.
Lights are symmetric about x = 0, so a mirrored clip is a clip of the same world.
"""

import io
from dataclasses import dataclass
from functools import cache

import numpy as np

LOOKS = ("plain", "real")
COLOURS = {
    "red": (0.85, 0.12, 0.10),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.95, 0.80, 0.10),
    "purple": (0.55, 0.15, 0.70),
    "cyan": (0.10, 0.75, 0.80),
}
PHRASE = {"plain": "plain look", "real": "realistic look"}
FLOORS = ("wood", "concrete")
GROUNDS = ("asphalt", "grass", "facade")


@dataclass(frozen=True)
class Look:
    """One draw of a look: which floor, how bright, how warm, how noisy. `name` is `plain` or `real`."""

    name: str
    floor: str = "flat"
    brightness: float = 1.0
    warmth: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0

    @classmethod
    def draw(cls, name: str, rng: np.random.Generator) -> "Look":
        """A look of that name; the plain one has nothing to draw."""
        if name == "plain":
            return cls("plain")
        return cls(
            "real",
            floor=str(rng.choice(FLOORS)),
            brightness=float(rng.uniform(0.92, 1.08)),
            warmth=float(rng.uniform(0.0, 0.04)),
            noise=float(rng.uniform(1.0, 2.5)),
            noise_seed=int(rng.integers(2**31)),
        )

    def assets(self) -> tuple[str, dict[str, bytes]]:
        """MJCF assets of this look (the same for every draw of it, so a GL context can be kept) and their files."""
        if self.name == "plain":
            sky = 'builtin="gradient" rgb1=".75 .85 .95" rgb2=".95 .97 1" width="32" height="32"'
            return f'<texture type="skybox" {sky}/>', {}
        files = {f"{name}.png": _texture(name) for name in (*FLOORS, "speckle")}
        xml = '<texture type="skybox" builtin="gradient" rgb1=".36 .52 .75" rgb2=".93 .85 .74" width="32" height="32"/>'
        for name in FLOORS:
            xml += f'<texture name="{name}" type="2d" file="{name}.png"/>'
            xml += f'<material name="{name}" texture="{name}" texrepeat="1 1"/>'
        xml += '<texture name="speckle" type="cube" file="speckle.png" gridsize="1 1"/>'
        xml += '<material name="speckle" texture="speckle" specular=".6" shininess=".6"/>'
        return xml, files

    def street(self) -> tuple[str, dict[str, bytes]]:
        """`assets` of an outdoor scene: materials asphalt, grass, facade, lacquer (colours come with the geom)."""
        if self.name == "plain":
            sky, files = 'rgb1=".45 .65 .95" rgb2=".85 .92 1"', {}
        else:
            sky = 'rgb1=".3 .47 .72" rgb2=".95 .88 .76"'
            files = {f"{name}.png": _texture(name) for name in GROUNDS}
        xml = f'<texture type="skybox" builtin="gradient" {sky} width="32" height="32"/>'
        xml += "".join(f'<texture name="{name[:-4]}" type="2d" file="{name}"/>' for name in files)
        for name in GROUNDS:
            texture = f'texture="{name}"' if files else ""
            repeat = 'texrepeat=".2 .2" texuniform="true"' if name == "grass" else ""
            xml += f'<material name="{name}" {texture} {repeat} specular="0" shininess="0"/>'
        gloss = 'specular=".2" shininess=".3"' if self.name == "plain" else 'specular=".7" shininess=".7"'
        return xml + f'<material name="lacquer" {gloss}/>', files

    def sun(self) -> str:
        """A low sun ahead, whose light moves along with the body that it hangs on."""
        b = self.brightness
        d = ".5 .5 .5" if self.name == "plain" else f"{0.78 * b:g} {0.72 * b:g} {0.6 * b:g}"
        place = 'mode="track" directional="true" pos="10 0 30" dir="-.45 0 -1"'
        return f'<light {place} diffuse="{d}" specular=".4 .4 .4"/>'

    def surface(self, rgba: str) -> str:
        """Attributes of a big flat geom (floor, table): a flat colour, or this draw's texture."""
        return f'rgba="{rgba}"' if self.name == "plain" else f'material="{self.floor}"'

    def paint(self, colour: str) -> str:
        """Attributes of an object of a named colour."""
        rgba = "{:g} {:g} {:g} 1".format(*COLOURS[colour])
        return f'rgba="{rgba}"' if self.name == "plain" else f'material="speckle" rgba="{rgba}"'

    def lights(self, height: float) -> str:
        """A lamp over the scene, straight above x = 0 and a little in front."""
        h, b = height, self.brightness
        if self.name == "plain":
            return f'<light pos="0 {-0.4 * h} {h}" dir="0 .38 -1" diffuse=".7 .7 .7" specular=".1 .1 .1"/>'
        d = f"{0.8 * b:g} {0.76 * b:g} {0.68 * b:g}"
        beam = 'specular=".4 .4 .4" cutoff="60" exponent="4"'
        return f'<light pos="0 {-0.2 * h} {h}" dir="0 .2 -1" diffuse="{d}" {beam}/>'

    def headlight(self) -> str:
        """The even light that comes from the camera."""
        ambient, diffuse = (".45 .45 .45", ".25 .25 .25") if self.name == "plain" else (".46 .46 .5", ".22 .22 .22")
        return f'<headlight ambient="{ambient}" diffuse="{diffuse}" specular="0 0 0"/>'

    def develop(self, frames: np.ndarray) -> np.ndarray:
        """What the camera makes of the light: frames float32 [T, H, W, 3] in 0..255 to uint8, with vignette, warmth and
        sensor noise in the real look."""
        if self.name == "real":
            t, h, w, _ = frames.shape
            y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
            gain = (1 - 0.12 * (x**2 + y**2))[None, :, :, None] * np.array([1 + self.warmth, 1.0, 1 - self.warmth])
            rng = np.random.default_rng(self.noise_seed)
            frames = frames * gain + rng.normal(0, self.noise, frames.shape)
        return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


@cache
def _texture(name: str, size: int = 128) -> bytes:
    """A tileable PNG: `wood` (long grain), `concrete` (soft blotches), `speckle` (nearly white, for tinted objects),
    `asphalt` (fine grain), `grass` (blotches), `facade` (windows in a nearly white wall, for tinted houses)."""
    from PIL import Image

    rng = np.random.default_rng(sum(map(ord, name)))
    grains = {"wood": (2, 10), "concrete": (4, 4), "speckle": (12, 12)}
    grains |= {"asphalt": (24, 24), "grass": (9, 9), "facade": (6, 6)}
    grain = grains[name]
    bases = {"wood": (150, 104, 66), "concrete": (142, 140, 136), "speckle": (238, 238, 238)} | {
        "asphalt": (235, 235, 238), "grass": (225, 225, 210), "facade": (232, 230, 226)}  # fmt: skip
    swing = {"wood": 26, "concrete": 9, "speckle": 14, "asphalt": 20, "grass": 26, "facade": 8}[name]
    spectrum = np.fft.fft2(rng.normal(size=(size, size)))
    fy, fx = np.meshgrid(np.fft.fftfreq(size) * size, np.fft.fftfreq(size) * size, indexing="ij")
    field = np.fft.ifft2(spectrum * np.exp(-((fx / grain[0]) ** 2 + (fy / grain[1]) ** 2))).real
    field = (field / field.std())[..., None] * swing
    if name == "wood":
        field = field - 22 * (np.arange(size) % (size // 4) < 2)[:, None, None]
    if name == "facade":
        row, column = np.arange(size)[:, None] % (size // 2), np.arange(size)[None] % (size // 3)
        pane = (row > size * 0.12) & (row < size * 0.36) & (column > size * 0.08) & (column < size * 0.25)
        field = field - np.where(pane, 150, 0)[..., None]
    pixels = np.clip(np.array(bases[name]) + field, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
