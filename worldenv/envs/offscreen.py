"""MuJoCo, and pictures of its scenes without a display: EGL or OSMesa, whichever this machine has.

The library is chosen when the first picture is taken, not at import, so physics alone needs none. The context is opened directly
(`mujoco.egl`, `mujoco.osmesa`), so it does not matter whether mujoco was imported before the choice.

Rooms take `mujoco` from here, because of what must come first. Mesa's software renderer brings its LLVM into the process for all to see; triton
has its own, and crashes when it is loaded later (by kernels, or by a torch optimizer) and finds Mesa's. Loaded before, it keeps its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import ctypes.util
import functools
import importlib
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldenv.nouns import Failed

with contextlib.suppress(ImportError):
    importlib.import_module("triton")

try:
    import mujoco
except Exception:  # MUJOCO_GL names a library that is not there, which PyOpenGL says in many ways: physics needs none, and pictures say so below
    if "MUJOCO_GL" not in os.environ:  # then it is mujoco itself that is not there
        raise
    _asked = os.environ["MUJOCO_GL"]
    os.environ["MUJOCO_GL"] = "disable"
    import mujoco

    os.environ["MUJOCO_GL"] = _asked

__all__ = ["NoOpenGL", "Offscreen", "backend", "mujoco"]

_EGL_PLATFORM_DEVICE = 0x313F
_MAX_DEVICES = 16


class NoOpenGL(Failed):
    """No picture can be drawn on this machine. The message says what to install."""


def _egl_works() -> bool:
    """Whether libEGL is there and one of its devices starts, as mujoco.egl will ask it to.

    Asked through ctypes: PyOpenGL settles on one platform for the process when it is imported, so it cannot be used for trying.
    """
    try:
        egl = ctypes.CDLL(ctypes.util.find_library("EGL") or "libEGL.so.1")
        address = egl.eglGetProcAddress
    except (OSError, AttributeError):
        return False
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    query, display_of = address(b"eglQueryDevicesEXT"), address(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    devices, count = (ctypes.c_void_p * _MAX_DEVICES)(), ctypes.c_int(0)
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)
    if not query_devices(_MAX_DEVICES, devices, ctypes.byref(count)):
        return False
    platform_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    displays = (platform_display(_EGL_PLATFORM_DEVICE, device, None) for device in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)


def _osmesa_works() -> bool:
    """Whether libOSMesa is there, where PyOpenGL will look for it."""
    return ctypes.util.find_library("OSMesa") is not None


def backend() -> str:
    """The OpenGL backend of this process: MUJOCO_GL where it is set; else egl or osmesa (the system's own outside Linux), which is then set.

    Raises NoOpenGL where there is none.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not chosen and sys.platform.startswith("linux"):
        chosen = "egl" if _egl_works() else "osmesa" if _osmesa_works() else ""
        if not chosen:
            raise NoOpenGL("no OpenGL library works here: install libegl1 libgl1-mesa-dri or libosmesa6 (apt-get install ...)")
        os.environ["MUJOCO_GL"] = chosen
    return chosen or "native"


def _open(model: Any, height: int, width: int) -> tuple[Any, Any]:
    """A current OpenGL context, and MuJoCo's drawing context in it. Raises NoOpenGL."""
    name = backend()
    try:
        module = importlib.import_module(f"mujoco.{name}" if name in ("egl", "osmesa") else "mujoco.gl_context")
        gl = module.GLContext(width, height)
        gl.make_current()
        return gl, mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
    except Exception as error:  # PyOpenGL and MuJoCo say in many ways that a library is not there
        raise NoOpenGL(
            f"no OpenGL library works here with MUJOCO_GL={name} ({type(error).__name__}: {' '.join(str(error).split())}): "
            "install libegl1 libgl1-mesa-dri or libosmesa6, or unset MUJOCO_GL"
        ) from error


class Offscreen:
    """Draws one model into pictures of one size. Not for use by two threads at once."""

    def __init__(self, model: Any, height: int, width: int, hidden: Sequence[int] = ()) -> None:
        """Open a context for `model` (mujoco.MjModel); its offscreen buffer must be at least (height, width). Raises NoOpenGL.

        Geoms of the groups `hidden` are not drawn.
        """
        self._model = model
        self._shape = (height, width, 3)
        self._gl, self._context = _open(model, height, width)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._view = mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 16)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[list(hidden)] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
        _alive.add(self)
        _close_at_exit()

    def renderer(self) -> str:
        """Who draws, e.g. "llvmpipe (LLVM 15.0.6, 256 bits)"."""
        gl = importlib.import_module("OpenGL.GL")  # after the context chose the platform
        self._gl.make_current()
        name = gl.glGetString(gl.GL_RENDERER)
        return name.decode() if isinstance(name, bytes) else str(name)

    def picture(self, data: Any, camera: int) -> NDArray[np.uint8]:
        """What camera number `camera` sees of `data` (mujoco.MjData, positions computed): a new (H, W, 3) uint8, top row first."""
        self._gl.make_current()
        self._camera.fixedcamid = camera
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._view, self._scene, self._context)
        picture = np.empty(self._shape, np.uint8)
        mujoco.mjr_readPixels(picture, None, self._view, self._context)
        return picture[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the context; no picture after that."""
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None

    def __del__(self) -> None:
        if hasattr(self, "_context"):  # opened
            self.close()


_alive: weakref.WeakSet[Offscreen] = weakref.WeakSet()


def _close_all() -> None:
    for one in list(_alive):
        one.close()


@functools.cache
def _close_at_exit() -> None:
    """Close what is still open when Python ends. Called after the first context: exit runs backward, so this is before EGL takes its leave."""
    atexit.register(_close_all)
