"""The models that have a name, and where their files lie. Specifications: of the base model, section 2.3, and of
Transfer, sections 1.7 and 3.

No torch is imported here: `orrery models` answers at once.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from orrery.errors import InputError
from orrery.kinds import KINDS

_HERE = Path(__file__).parent
GB = 1e9

NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, over-saturation, "
    "shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, underexposed and overexposed "
    "scenes, poor color balance, washed out colors, choppy sequences, jerky movements, low frame rate, artifacting, "
    "color banding, unnatural transitions, outdated special effects, fake elements, unconvincing visuals, poorly "
    "edited content, jump cuts, visual noise, and flickering. Overall, the video is of poor quality."
)
# For Cosmos-Transfer2.5. The official code has another text there, about the look of a video game; this one is ours, in
# that spirit, and not the official wording.
TRANSFER_NEGATIVE_PROMPT = (
    "The video looks like a video game or a cheap computer animation instead of a camera's recording: flat shading, "
    "coarse geometry, plastic textures, wrong lighting and shadows, jagged edges, stiff and unnatural motion. Overall, "
    "the video is of poor quality."
)
# (H, W) by resolution and aspect ratio (width to height). Specification, section 4.5.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "256": {"1:1": (256, 256), "4:3": (256, 320), "3:4": (320, 256), "16:9": (192, 320), "9:16": (320, 192)},
    "480": {"1:1": (480, 480), "4:3": (480, 640), "3:4": (640, 480), "16:9": (432, 768), "9:16": (768, 432)},
    "480p": {"1:1": (640, 640), "4:3": (480, 640), "3:4": (640, 480), "16:9": (480, 832), "9:16": (832, 480)},
    "512": {"1:1": (512, 512), "4:3": (512, 640), "3:4": (640, 512), "16:9": (384, 640), "9:16": (640, 384)},
    "720": {"1:1": (960, 960), "4:3": (704, 960), "3:4": (960, 704), "16:9": (704, 1280), "9:16": (1280, 704)},
    "720p": {"1:1": (960, 960), "4:3": (720, 960), "3:4": (960, 720), "16:9": (720, 1280), "9:16": (1280, 720)},
    "1024": {"1:1": (1024, 1024), "4:3": (1024, 1280), "3:4": (1280, 1024), "16:9": (768, 1280), "9:16": (1280, 768)},
    "1080": {"1:1": (1024, 1024), "4:3": (1056, 1440), "3:4": (1440, 1056), "16:9": (1056, 1920), "9:16": (1920, 1056)},
}
ASPECTS = tuple(SIZES["720"])
_RATIOS = {
    size: int(aspect.partition(":")[0]) / int(aspect.partition(":")[2])
    for sizes in SIZES.values()
    for aspect, size in sizes.items()
}


@dataclass(frozen=True)
class HubFiles:
    """A file of a hub repository, or the part of it that the patterns name, at one revision; and how many bytes."""

    repo: str
    revision: str | None
    file: str | None = None
    patterns: tuple[str, ...] = ()
    size: float = 0.0

    def __str__(self) -> str:
        return f"{self.repo}/{self.file or ''}@{(self.revision or 'main')[:12]}"


@dataclass(frozen=True)
class ModelEntry:
    """A named model.

    folder: of a model that comes with the package. weights: the transformer of a published one; its VAE and its text
    encoder are the COMPONENTS. controls: the published control branches by kind; each file holds the branch and the
    base beside which it was trained, the same base in all. network: preset of the transformer. sampling: what differs
    from `Sampling`'s defaults. native: what differs from NATIVE. actions: fields of the `ActionConfig` of a published
    model that is told what a robot does. unsupported: why it cannot be loaded yet.
    """

    name: str
    summary: str
    folder: Path | None = None
    weights: HubFiles | None = None
    controls: Mapping[str, HubFiles] = field(default_factory=dict)
    network: str = "2b"
    network_options: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    text_only: bool = False
    native: Mapping[str, Any] = field(default_factory=dict)
    actions: Mapping[str, Any] = field(default_factory=dict)
    unsupported: str = ""

    @property
    def files(self) -> tuple[HubFiles, ...]:
        """The published files of its own weights."""
        return tuple(self.controls.values()) or ((self.weights,) if self.weights else ())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of control that it follows, in the order of KINDS."""
        listed = self._config().get("controls", {}) if self.folder is not None else self.controls
        return tuple(kind for kind in KINDS if kind in listed)

    @property
    def action_names(self) -> tuple[str, ...]:
        """Of the numbers of an action that it is told; () for a model that is told none."""
        actions = (self._config().get("actions") or {}) if self.folder is not None else self.actions
        return tuple(actions.get("names", ()))

    def _config(self) -> dict[str, Any]:
        """config.json of a model in the package; {} where it cannot be read, which is told when it is loaded."""
        assert self.folder is not None
        try:
            values = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def state(self) -> str:
        """In a word or two: whether its own weights are on this machine."""
        if self.folder is not None:
            return "in the package" if (self.folder / "config.json").is_file() else "missing"
        if self.unsupported:
            return "not supported yet"
        from orrery.weights.hub import cached_file

        files = self.files
        here = sum(cached_file(each.repo, each.file or "", each.revision) is not None for each in files)
        if 0 < here < len(files):
            return f"{here} of {len(files)} downloaded"
        return "downloaded" if here else "not downloaded"

    @property
    def size(self) -> float:
        """Bytes of its own weights: of the files in the package, or of the published files."""
        if self.folder is not None:
            return float(sum(file.stat().st_size for file in self.folder.glob("*.safetensors")))
        return sum(each.size for each in self.files)


_2B, _14B, _EXPERIMENTAL = "nvidia/Cosmos-Predict2.5-2B", "nvidia/Cosmos-Predict2.5-14B", "nvidia/Cosmos-Experimental"
_TRANSFER = "nvidia/Cosmos-Transfer2.5-2B"
_SIZE_2B, _SIZE_14B = 4.12 * GB, 28.74 * GB
_MAIN_2B = "15a82a2ec231bc318692aa0456a36537c806e7d4"
_POST = {"schedule": "karras", "conditional_timestep": 0.1}
_DISTILLED = {"solver": "renoise", "schedule": "distilled", "steps": 4, "guidance": 0.0, "exact_times": True}
_DISTILLED |= {"conditional_timestep": 0.1}
_GUIDED = {"guidance": 3.0, "negative_prompt": TRANSFER_NEGATIVE_PROMPT}
_TRANSFER_V1 = "bd963eabcfc2d61dc4ea365cacf41d45ac480aa5"
# Of a base and its branch in bfloat16, counted from their shapes: without and with image context.
_SIZE_TRANSFER, _SIZE_IMAGE = 4.72 * GB, 5.53 * GB
_VIEWS, _CAMERAS = "multi-view", "camera conditioning"
# Told actions. Specification of Transfer, section 4.6. One action a frame: the motion of the gripper in its own frame
# before it (metres, and radians about x, y, z), 20 times, and how far it is open; not normalised otherwise.
_BRIDGE = {
    "names": ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    "mean": (0.0,) * 7,
    "std": (1.0,) * 7,
    "scale": (20.0,) * 6 + (1.0,),
    "window": 4,
    "given": 1,
    "handover": "frames",
    "empty_prompt": "encoded",
}
_BRIDGE_VIDEO = {"fps": 4.0, "frames": 13, "resolution": (256, 320), "trained_sizes": (), "any_length": False}
_SIZE_ACTIONS = _SIZE_2B + 0.135 * GB  # two MLPs more, counted from their shapes


def _published(name: str, repo: str, file: str, revision: str | None, summary: str, **more: Any) -> ModelEntry:
    size = more.pop("size", _SIZE_14B if more.get("network") == "14b" else _SIZE_2B)
    return ModelEntry(name, summary, weights=HubFiles(repo, revision, file, size=size), **more)


def _transfer(name: str, files: Mapping[str, tuple[str, str]], summary: str, size: float, **more: Any) -> ModelEntry:
    """files: kind -> (folder/identifier, revision)."""
    controls = {
        kind: HubFiles(_TRANSFER, revision, f"{file}_ema_bf16.pt", size=size)
        for kind, (file, revision) in files.items()
    }
    return ModelEntry(name, summary, weights=next(iter(controls.values())), controls=controls, **more)


_ENTRIES = (
    ModelEntry(
        "mini",
        "orrery-mini: small worlds of falling and pushed things, trained by us in MuJoCo",
        folder=_HERE / "mini",
        network="mini",
    ),
    ModelEntry(
        "tabletop",
        "orrery-tabletop: the tabletop world, told a robot's actions; 64x64",
        folder=_HERE / "tabletop",
        network="mini",
    ),
    _published(
        "predict2.5-2b", _2B, "base/post-trained/81edfebe-bd6a-4039-8c1d-737df1a790bf_ema_bf16.pt", _MAIN_2B,
        "2B, post-trained (merged, then RL): the published default", sampling=_POST,
    ),
    _published(
        "predict2.5-2b-pretrained", _2B, "base/pre-trained/d20b7120-df3e-4911-919d-db6e08bad31c_ema_bf16.pt", _MAIN_2B,
        "2B, pre-trained: the one to fine-tune",
    ),
    _published(
        "predict2.5-2b-distilled", _2B, "base/distilled/575edf0f-d973-4c74-b52c-69929a08d0a5_ema_bf16.pt",
        "e26f8a125a2235c5a00245a65207402dd0cdcb89", "2B, distilled to 4 steps without guidance; for Text2World",
        network_options={"fp32_modulation": False}, sampling=_DISTILLED, text_only=True,
    ),
    _published(
        "predict2.5-14b", _14B, "base/post-trained/e21d2a49-4747-44c8-ba44-9f6f9243715f_ema_bf16.pt",
        "2bc4ca5ba5a20b9858a7ddb856bc82d70b030fbe", "14B, post-trained", network="14b",
    ),
    _published(
        "predict2.5-14b-pretrained", _14B, "base/pre-trained/54937b8c-29de-4f04-862c-e67b04ec41e8_ema_bf16.pt",
        "03eb354f35eae0d6e0c1be3c9f94d8551e125570", "14B, pre-trained", network="14b",
    ),
    _published(
        "predict2.5-2b-multiview", _2B, "auto/multiview/524af350-2e43-496c-8590-3646ae1325da_ema_bf16.pt",
        "865baf084d4c9e850eac59a021277d5a9b9e8b63", "2B for driving: 7 views, 29 frames", unsupported=_VIEWS,
    ),
    _published(
        "predict2.5-2b-multiview-v1", _2B, "auto/multiview/6b9d7548-33bb-4517-b5e8-60caf47edba7_ema_bf16.pt", _MAIN_2B,
        "its first release", unsupported=_VIEWS,
    ),
    _published(
        "predict2.5-2b-action", _2B, "robot/action-cond/38c6c645-7d41-4560-8eeb-6f4ddc0e6574_ema_bf16.pt", None,
        "2B that is told a robot's actions: Bridge, 256x320, 13 frames, 7 numbers an action", size=_SIZE_ACTIONS,
        network_options={"actions": 28}, sampling={"guidance": 0.0}, native=_BRIDGE_VIDEO, actions=_BRIDGE,
    ),
    _published(
        "predict2.5-2b-camera", _2B, "robot/multiview-agibot/f740321e-2cd6-4370-bbfe-545f4eca2065_ema_bf16.pt",
        "fbe72c18d152053029a19db3b211cf78671ad422", "2B for moving cameras: AgiBot's three", unsupported=_CAMERAS,
    ),
    _published(
        "predict2.5-2b-camera-v1", _EXPERIMENTAL, "7f6b99b7-7fac-4e74-8dbe-a394cb56ef99/model_ema_bf16.pt",
        "9a02ed8daa8c6c7718ac09da06488bfd1d363cb6", "its first release, experimental", unsupported=_CAMERAS,
    ),
    _published(
        "predict2.5-2b-syncam", _EXPERIMENTAL, "0e8177cc-0db5-4cfd-a8a4-b820c772f4fc/model_ema_bf16.pt",
        "9a02ed8daa8c6c7718ac09da06488bfd1d363cb6", "2B for synchronous cameras, experimental", unsupported=_CAMERAS,
    ),
    _published(
        "predict2.5-2b-many-cameras", _EXPERIMENTAL, "a8794d70-842c-44a5-95bb-9010d5ace7be/model_ema_bf16.pt", None,
        "2B, four views in and one out, 480p, experimental", unsupported=_CAMERAS,
    ),
    _published(
        "predict2.5-2b-gr00t", _EXPERIMENTAL, "7bbc8d06-2bc9-448d-94ee-b48b4ab7189c/model_ema_bf16.pt",
        "2b5e9a99b58d5a61259ca99962c4c74127481006", "interactive warm-up on GR00T, experimental",
        unsupported="a causal rollout, latent after latent, told 29 numbers an action",
    ),
    _published(
        "predict2.5-2b-gr1", _EXPERIMENTAL, "bedc35da-1a54-4144-83db-6072c29b0fd9",
        "ded876a5b2e19aef64cd9d1100c03e5b05cf2f9c", "interactive warm-up on GR1, experimental",
        unsupported="torch's distributed checkpoint folders",
    ),
    _published(
        "predict2.5-2b-edm", _EXPERIMENTAL, "308eb96c-c4c0-4a06-9cc1-103a43beff28",
        "eda2f0ca1db6281c9a960908bb6bf14607a0fea0", "2B of the EDM stage of training, experimental",
        unsupported="torch's distributed checkpoint folders",
    ),
    _published(
        "predict2.5-2b-37k", _EXPERIMENTAL, "24a3b7b8-6a3d-432d-b7d1-5d30b9229465/model_ema_bf16.pt",
        "9a02ed8daa8c6c7718ac09da06488bfd1d363cb6", "2B, the frozen base under Cosmos-Transfer2.5, experimental",
    ),
    _transfer(
        "transfer2.5-2b",
        {
            "edge": ("general/edge/61f5694b-0ad5-4ecd-8ad7-c8545627d125", "b67b64abda3801a9aceddbff2bdb86126c06db74"),
            "blur": ("general/blur/ba2f44f2-c726-4fe7-949f-597069d9b91c", "eb5325b77d358944da58a690157dd2b8071bbf85"),
            "depth": ("general/depth/626e6618-bfcd-4d9a-a077-1409e2ce353f", "dea7737ca29dd8d9086413c6dc5724b8250a0bb4"),
            "seg": ("general/seg/5136ef49-6d8d-42e8-8abf-7dac722a304a", "23057a4167b89de89a4a397fdbf3887994d115eb"),
        },
        "2B that follows a control video; with one control also a reference image", _SIZE_IMAGE,
        network_options={"image_context": 1152}, sampling=_GUIDED,
    ),
    _transfer(
        "transfer2.5-2b-v1",
        {
            "edge": ("general/edge/ecd0ba00-d598-4f94-aa09-e8627899c431", _TRANSFER_V1),
            "blur": ("general/blur/20d9fd0b-af4c-4cca-ad0b-f9b45f0805f1", _TRANSFER_V1),
            "depth": ("general/depth/0f214f66-ae98-43cf-ab25-d65d09a7e68f", _TRANSFER_V1),
            "seg": ("general/seg/fcab44fe-6fe7-492e-b9c6-67ef8c1a52ab", _TRANSFER_V1),
        },
        "its first release, without reference images", _SIZE_TRANSFER, sampling=_GUIDED,
    ),
    _transfer(  # its timestep_scale of 1 is of times in 0..1; the default's 0.001 of our 0..1000 is the same number
        "transfer2.5-2b-edge-distilled",
        {
            "edge": (
                "distilled/general/edge/41f07f13-f2e4-4e34-ba4c-86f595acbc20",
                "bbaeedb2b57cc8b14a44653099e2551adb69dcc7",
            )
        },
        "2B that follows edges, distilled to 4 steps without guidance", _SIZE_TRANSFER,
        network_options={"fp32_modulation": False}, sampling=_DISTILLED,
    ),
    _published(
        "transfer2.5-2b-multiview", _TRANSFER, "auto/multiview/4ecc66e9-df19-4aed-9802-0d11e057287a_ema_bf16.pt",
        "00c591edab119e8a6ca06e6e091351a04ce0ecc9", "2B for driving: 7 views after world-scenario maps",
        unsupported=_VIEWS,
    ),
    _published(
        "transfer2.5-2b-multiview-v1", _TRANSFER, "auto/multiview/b5ab002d-a120-4fbf-a7f9-04af8615710b_ema_bf16.pt",
        _TRANSFER_V1, "its first release", unsupported=_VIEWS,
    ),
)  # fmt: skip
CATALOGUE = {entry.name: entry for entry in _ENTRIES}

# What the published models share.
COMPONENTS = {
    "wan2.1": HubFiles(_2B, "f176dc95b4a70f53ce01c4b302851595e7322b00", "tokenizer.pth", size=0.508 * GB),
    "reason1-7b": HubFiles(
        "nvidia/Cosmos-Reason1-7B",
        "3210bec0495fdc7a8d3dbb8d58da5711eab4b423",
        patterns=("*.safetensors", "*.json"),
        size=16.6 * GB,
    ),
    "siglip2": HubFiles(
        "google/siglip2-so400m-patch16-naflex", None, patterns=("*.safetensors", "config.json"), size=4.5 * GB
    ),
}
NATIVE: dict[str, Any] = {"fps": 16.0, "frames": 93, "resolution": (704, 1280)}


def find_entry(name: str) -> ModelEntry:
    """The entry of that name.

    Raises:
        InputError: there is none, or it cannot be loaded yet.
    """
    entry = CATALOGUE.get(name)
    if entry is None:
        close = get_close_matches(name, CATALOGUE, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise InputError(
            f"unknown model {name!r}{hint}; allowed are {', '.join(supported())}, a model's folder, an official .pt, a "
            "diffusers directory, or OWNER/NAME of a hub repository"
        )
    if entry.unsupported:
        raise InputError(f"model {name!r} is not supported yet: it needs {entry.unsupported}")
    return entry


def supported() -> list[str]:
    """Names that can be loaded."""
    here = [entry for entry in CATALOGUE.values() if entry.folder is None or (entry.folder / "config.json").is_file()]
    return [entry.name for entry in here if not entry.unsupported]


def entry_of_file(path: Path) -> ModelEntry | None:
    """The entry whose published file this is, by the identifier in its name."""
    return next((entry for entry in CATALOGUE.values() if any(_is_of(path, files) for files in entry.files)), None)


def control_of_file(path: Path) -> str | None:
    """The kind of the published control branch that this file holds, by the identifier in its name."""
    pairs = [pair for entry in CATALOGUE.values() for pair in entry.controls.items()]
    return next((kind for kind, files in pairs if _is_of(path, files)), None)


def _is_of(path: Path, files: HubFiles) -> bool:
    identifier = next((part for part in reversed((files.file or "").split("/")) if part.count("-") >= 4), "")
    return bool(identifier) and identifier.removesuffix("_ema_bf16.pt") in str(path)


def nearest_size(sizes: Iterable[tuple[int, int]], shape: tuple[int, int]) -> tuple[int, int]:
    """The (H, W) of `sizes` whose aspect ratio, width to height, is nearest to that of `shape`, by squared difference
    as published; a published size counts as the ratio that it is named after (704x1280 as 16:9)."""

    def distance(size: tuple[int, int]) -> float:
        return (_RATIOS.get(size, size[1] / size[0]) - shape[1] / shape[0]) ** 2

    return min(sizes, key=distance)


def size_of(resolution: str, aspect: str = "16:9") -> tuple[int, int]:
    """(H, W) of an entry of the published table, such as "720" and "16:9" (width to height).

    Raises:
        InputError: no such entry.
    """
    if resolution not in SIZES:
        raise InputError(f"resolution is {resolution!r}; allowed are {', '.join(SIZES)}, or a size HxW")
    if aspect not in ASPECTS:
        raise InputError(f"aspect is {aspect!r}; allowed are {', '.join(ASPECTS)} (width to height)")
    return SIZES[resolution][aspect]
