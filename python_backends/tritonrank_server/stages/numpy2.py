"""NumPy 2 under the embedded server's stubs, which are compiled for NumPy 1 (pybind11 2.10).

Python 3.13 has no NumPy 1, and there is no newer Triton on PyPI. Such a stub reads an array's item
size at NumPy 1's place, where NumPy 2 has flags, and gets 0. Two things go wrong for it:

- It makes arrays with strides of 0, so that every item is the first. ``mend`` gives it NumPy's own
  table of C functions with one entry wrapped: an array made over memory with strides of 0 is made
  contiguous, which is all that the stub ever means.
- It takes a tensor to have 0 bytes. ``tensor`` hands it over by DLPack, which has no item size.

Only ``serve`` switches this on, by ``SWITCH`` in the environment of the server it starts.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import numpy as np

SWITCH = "TRITONRANK_NUMPY_1_STUB"

#: The place of PyArray_NewFromDescr in NumPy's table, and how much of the table pybind11 reads.
NEW_FROM_DESCR, TABLE_SIZE = 94, 300

_NEW_CAPSULE = ctypes.pythonapi.PyCapsule_New
_NEW_CAPSULE.restype = ctypes.py_object
_NEW_CAPSULE.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_GET_POINTER = ctypes.pythonapi.PyCapsule_GetPointer
_GET_POINTER.restype = ctypes.c_void_p
_GET_POINTER.argtypes = [ctypes.py_object, ctypes.c_char_p]
_SET_DESTRUCTOR = ctypes.pythonapi.PyCapsule_SetDestructor
_SET_DESTRUCTOR.argtypes = [ctypes.py_object, ctypes.c_void_p]

_Sizes = ctypes.POINTER(ctypes.c_ssize_t)
_NewFromDescr = ctypes.PYFUNCTYPE(
    ctypes.c_void_p,  # the new array, from:
    ctypes.c_void_p,  # its type
    ctypes.c_void_p,  # its dtype
    ctypes.c_int,  # its number of dimensions
    _Sizes,  # its shape
    _Sizes,  # its strides
    ctypes.c_void_p,  # its memory
    ctypes.c_int,  # its flags
    ctypes.c_void_p,  # the object it is made for
)

#: What ctypes must not free while the stub runs.
_alive: list[Any] = []


def mend() -> None:
    """Gives the stub the wrapped table; to be called before it makes its first array."""
    multiarray: Any = importlib.import_module("numpy.core.multiarray")  # where pybind11 2.10 looks
    table = (ctypes.c_void_p * TABLE_SIZE).from_address(_GET_POINTER(multiarray._ARRAY_API, None))
    wrapped = (ctypes.c_void_p * TABLE_SIZE)(*table)
    new_from_descr = _NewFromDescr(wrapped[NEW_FROM_DESCR] or 0)

    def contiguous(
        kind: int, dtype: int, ndim: int, shape: Any, strides: Any, *rest: int
    ) -> int | None:
        if strides and not any(strides[:ndim]):
            strides = None
        made: int | None = new_from_descr(kind, dtype, ndim, shape, strides, *rest)
        return made

    callback = _NewFromDescr(contiguous)
    wrapped[NEW_FROM_DESCR] = ctypes.cast(callback, ctypes.c_void_p)
    multiarray._ARRAY_API = _NEW_CAPSULE(ctypes.addressof(wrapped), None, None)
    _alive.extend([wrapped, callback])


def tensor(name: str, array: np.ndarray[Any, Any]) -> Any:
    """``pb_utils.Tensor(name, array)`` for numbers, by way of DLPack."""
    import triton_python_backend_utils as pb_utils

    capsule = np.ascontiguousarray(array).__dlpack__()
    # The stub frees the memory itself, and renames the capsule to what NumPy does not know.
    _SET_DESTRUCTOR(capsule, None)
    return pb_utils.Tensor.from_dlpack(name, capsule)
