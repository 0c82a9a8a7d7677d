"""Is there an OpenGL that draws without a screen? MuJoCo's cameras need EGL or OSMesa. Installs one where it can.

Standard library only. One line says what was found or done; the exit code is always 0, because generating worlds with
a model needs no GL.
"""

import ctypes
import os
import shutil
import subprocess
import sys

EGL_PLATFORM_SURFACELESS_MESA = 0x31DD
EGL_PLATFORM_DEVICE_EXT = 0x313F


def library(*names: str) -> ctypes.CDLL | None:
    """The first of these shared libraries that loads."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def egl_works() -> bool:
    """libEGL is there and can open a display that needs no screen (it needs a driver, too)."""
    egl = library("libEGL.so.1", "libEGL.so")
    if egl is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not address:
        return False
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(address)
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    for platform in (EGL_PLATFORM_SURFACELESS_MESA, EGL_PLATFORM_DEVICE_EXT):
        display = get_display(platform, None, None)
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def backend() -> str | None:
    """`egl`, `osmesa`, or None."""
    if egl_works():
        return "egl"
    if library("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        return "osmesa"
    return None


def main() -> int:
    if sys.platform != "linux":
        return 0
    if found := backend():
        print(f"headless OpenGL: {found}")
        return 0
    choices = (["libosmesa6"], ["libegl1", "libgl1-mesa-dri"])
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print("no headless OpenGL: `orrery sim` needs EGL or OSMesa (Debian, Ubuntu: sudo apt-get install libosmesa6)")
        return 0
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends"]
    subprocess.run(["apt-get", "update", "-qq"], env=environment, check=False)
    for packages in choices:
        print(f"no headless OpenGL: installing {' '.join(packages)}", flush=True)
        done = subprocess.run([*install, *packages], env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode == 0 and backend():
            return 0
    print("no headless OpenGL, and apt-get could not install libosmesa6 or libegl1: `orrery sim` will not work here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
