"""One planted fault on memory of exactly 64 floats, for a process that runs under sanitizers.

python -m tests.emulator.sanitized_fault LIBRARY NAME
"""

from __future__ import annotations

import ctypes
import sys

from . import emulator


def main() -> None:
    emulator.Memory.exact = True
    library = ctypes.CDLL(sys.argv[1])
    source, target = emulator.Memory(256), emulator.Memory(256)
    emulator.call(
        library.emulated_fault,
        sys.argv[2].encode(),
        ctypes.c_void_p(source.pointer),
        ctypes.c_void_p(target.pointer),
    )
    print("ran to the end")


if __name__ == "__main__":
    main()
