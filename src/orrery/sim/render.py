"""Headless MuJoCo rendering: one GL context a process, colour supersampled, depth and segmentation in one pass.

The GL context of MuJoCo holds textures, how materials use them, planes, meshes and a shadow map, so models with the
same materials and planes can share it (meshes and the shadows' reach are set again for each); making one costs 0.1 to
0.7 s, drawing a frame about 2 ms. Only MuJoCo's public drawing calls are used.
"""

import ctypes.util
import os
from typing import Any

import numpy as np

from orrery.errors import OrreryError

SUPERSAMPLE = 2
MAX_GEOMS = 2000


def choose_gl() -> str:
    """Picks MuJoCo's GL backend before its first import: the caller's MUJOCO_GL, else EGL, else OSMesa."""
    if "MUJOCO_GL" not in os.environ:
        found = [name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(library)]
        if not found:
            raise OrreryError(
                "no headless OpenGL library found (EGL or OSMesa); on Debian or Ubuntu: apt-get install libosmesa6"
            )
        os.environ["MUJOCO_GL"] = found[0]
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software rasteriser: parallelise by process instead
    return os.environ["MUJOCO_GL"]


def import_mujoco() -> Any:
    """The mujoco module, with a GL backend chosen; an OrreryError says how to install what is missing."""
    choose_gl()
    try:
        import mujoco
    except ImportError as error:
        raise OrreryError(f"simulation needs MuJoCo: pip install 'orrery[sim]' ({error})") from error
    return mujoco


class Camera:
    """Draws one model size by size from named cameras. Keep one a process and asset set; `use` switches the model."""

    def __init__(self, model: Any, size: int):
        self.mujoco = import_mujoco()
        self.size, self.wide = size, size * SUPERSAMPLE
        self.gl = self.mujoco.GLContext(self.wide, self.wide)
        self.gl.make_current()
        self.context = self.mujoco.MjrContext(model, self.mujoco.mjtFontScale.mjFONTSCALE_100.value)
        self.mujoco.mjr_setBuffer(self.mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self.context)
        self.context.readDepthMap = self.mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self.use(model)

    def use(self, model: Any) -> None:
        """Draws `model` from now on; its textures, materials, planes, shadow quality and number of meshes must be those
        of the model given to the constructor."""
        self.model = model
        self.gl.make_current()
        self.context.shadowClip = model.vis.map.shadowclip * model.stat.extent
        self.context.shadowScale = model.vis.map.shadowscale
        for mesh in range(model.nmesh):
            self.mujoco.mjr_uploadMesh(model, self.context, mesh)
        self.scene = self.mujoco.MjvScene(model, MAX_GEOMS)
        self.option = self.mujoco.MjvOption()

    def shoot(self, data: Any, camera: str, truth: bool) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Colour [H, W, 3] float32 in 0..255, and if `truth`: depth [H, W] float32 metres (inf where nothing is) and
        the MuJoCo geom id [H, W] int32 (-1 where nothing is)."""
        mj = self.mujoco
        view = mj.MjvCamera()
        view.type, view.fixedcamid = mj.mjtCamera.mjCAMERA_FIXED, self.model.camera(camera).id
        self.gl.make_current()
        mj.mjv_updateScene(self.model, data, self.option, None, view, mj.mjtCatBit.mjCAT_ALL.value, self.scene)
        wide = np.empty((self.wide, self.wide, 3), np.uint8)
        self._draw(wide, None, self.wide)
        s, n = SUPERSAMPLE, self.size
        colour = wide[::-1].reshape(n, s, n, s, 3).mean((1, 3), dtype=np.float32)
        if not truth:
            return colour, None, None
        flags = self.scene.flags
        flags[mj.mjtRndFlag.mjRND_SEGMENT] = flags[mj.mjtRndFlag.mjRND_IDCOLOR] = True
        ids, z = np.empty((n, n, 3), np.uint8), np.empty((n, n), np.float32)
        self._draw(ids, z, n)
        flags[mj.mjtRndFlag.mjRND_SEGMENT] = flags[mj.mjtRndFlag.mjRND_IDCOLOR] = False
        return colour, self._metres(z[::-1]), self._geoms(ids[::-1])

    def _draw(self, pixels: np.ndarray, depth: np.ndarray | None, size: int) -> None:
        rect = self.mujoco.MjrRect(0, 0, size, size)
        self.mujoco.mjr_render(rect, self.scene, self.context)
        self.mujoco.mjr_readPixels(pixels, depth, rect, self.context)

    def _metres(self, z: np.ndarray) -> np.ndarray:
        """Reversed-z buffer (1 near, 0 far) to metres along the optical axis."""
        extent = self.model.stat.extent
        near, far = self.model.vis.map.znear * extent, self.model.vis.map.zfar * extent
        with np.errstate(divide="ignore"):
            metres = near * far / (near + z.astype(np.float64) * (far - near))
        return np.where(z <= 0, np.inf, metres).astype(np.float32)

    def _geoms(self, ids: np.ndarray) -> np.ndarray:
        code = ids.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        table = np.full(self.scene.ngeom + 1, -1, np.int32)
        for geom in self.scene.geoms[: self.scene.ngeom]:
            if geom.segid >= 0 and geom.objtype == self.mujoco.mjtObj.mjOBJ_GEOM:
                table[geom.segid + 1] = geom.objid
        return table[code]

    def close(self) -> None:
        """Frees the GL context (Mesa complains at exit otherwise)."""
        self.gl.make_current()
        self.context.free()
        self.gl.free()


_CAMERAS: dict[tuple[Any, ...], Camera] = {}


def camera_for(model: Any, size: int) -> Camera:
    """The process's camera for models with this one's textures, materials, planes, number of meshes, shadow quality."""
    names = "tex_type tex_height tex_width tex_data mat_texid mat_texrepeat mat_texuniform".split()
    planes = model.geom_type == import_mujoco().mjtGeom.mjGEOM_PLANE.value
    held = [getattr(model, name) for name in names] + [model.geom_size[planes], model.geom_matid[planes]]
    looks = hash(b"|".join(np.ascontiguousarray(array).tobytes() for array in held))
    key = (size, model.nmesh, model.nmat, model.vis.quality.shadowsize, model.vis.quality.offsamples, looks)
    if key in _CAMERAS:
        _CAMERAS[key].use(model)
    else:
        _CAMERAS[key] = Camera(model, size)
    return _CAMERAS[key]
