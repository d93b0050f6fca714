"""One planted fault on buffers of exactly 64 floats, for a process that runs under sanitizers.

python -m tests.emulator.sanitized_fault LIBRARY NAME [BUFFERS]
"""

from __future__ import annotations

import ctypes
import sys

from . import emulator


def main() -> None:
    emulator.Memory.exact = True
    library = ctypes.CDLL(sys.argv[1])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    buffers = [emulator.Memory(256) for _ in range(count)]
    pointers = [ctypes.c_void_p(buffer.pointer) for buffer in buffers]
    emulator.call(library.emulated_fault, sys.argv[2].encode(), *pointers)
    print("ran to the end")


if __name__ == "__main__":
    main()
