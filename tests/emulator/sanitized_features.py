"""One kernel of features.cu in random order, for a process that runs under sanitizers.

python -m tests.emulator.sanitized_features LIBRARY NAME VALUES N
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from . import emulator


class Buffers(ctypes.Structure):
    """The argument of the kernels in features.cu."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("wide", ctypes.c_void_p),
        ("doubles", ctypes.c_void_p),
        ("n", ctypes.c_int),
    ]


def main() -> None:
    emulator.Memory.exact = True
    library = ctypes.CDLL(sys.argv[1])
    name, count, n = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    source = emulator.Memory(4 * count)
    source.bytes.view(np.float32)[:] = 1
    memory = [emulator.Memory(nbytes) for nbytes in (8192, 4096, 512, 512)]
    for part in memory:
        part.bytes[:] = 0

    buffers = Buffers(source.pointer, *(part.pointer for part in memory), n)
    with emulator.schedule(library, "random", 1):
        emulator.call(library.emulated_feature, name.encode(), ctypes.byref(buffers))
    print("ran to the end")


if __name__ == "__main__":
    main()
