"""Device memory and one stream by the CUDA driver's own library (`libcuda.so.1`), which every GPU machine has.

No CUDA toolkit and no torch: the agent stays light. The device's primary context is shared with whatever else in the
process uses CUDA.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from wire.errors import ForeshoreError

_LIBRARY = "libcuda.so.1"


class CudaError(ForeshoreError):
    """The CUDA driver is not here, or refuses a call."""

    code = "cuda_failed"


class Buffer:
    """A piece of device memory."""

    def __init__(self, driver: CudaDriver, address: int, size_bytes: int) -> None:
        self._driver, self.address, self.size_bytes = driver, address, size_bytes

    def write(self, data: np.ndarray[Any, Any]) -> None:
        """Copy a contiguous array to the device."""
        self._driver.call(
            "cuMemcpyHtoD_v2", ctypes.c_uint64(self.address), _pointer(data), ctypes.c_size_t(data.nbytes)
        )

    def read(self, data: np.ndarray[Any, Any]) -> None:
        """Fill a contiguous array from the device."""
        self._driver.call(
            "cuMemcpyDtoH_v2", _pointer(data), ctypes.c_uint64(self.address), ctypes.c_size_t(data.nbytes)
        )

    def free(self) -> None:
        """Give the memory back."""
        self._driver.call("cuMemFree_v2", ctypes.c_uint64(self.address))


class CudaDriver:
    """The first device, its primary context, one stream. `enter` first in each thread."""

    def __init__(self, number: int = 0) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise CudaError(f"there is no CUDA driver: {error}", remedy="install the GPU's driver") from error
        device, self._context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", ctypes.c_uint(0))
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(number))
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._device = device
        self.enter()
        self.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))  # in order with the copies
        self.stream = int(stream.value or 0)

    def enter(self) -> None:
        """Use the device in the calling thread."""
        self.call("cuCtxSetCurrent", self._context)

    def allocate(self, size_bytes: int) -> Buffer:
        """Take device memory."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size_bytes, 1)))
        return Buffer(self, int(address.value), size_bytes)

    def synchronise(self) -> None:
        """Wait for the stream; an error of what ran on it is raised here."""
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Let the stream and the context go."""
        self.enter()
        self.call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
        self.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def call(self, name: str, *arguments: Any) -> None:
        """One call of the driver; anything but success raises `CudaError`."""
        status = int(getattr(self._library, name)(*arguments))
        if status != 0:
            raise CudaError(f"{name} failed with CUDA error {status}", remedy="see the driver's documentation")


def _pointer(data: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(data.ctypes.data)
