"""LAMB's and LARS' kernels on every device, for a process that runs under sanitizers.

python -m tests.emulator.sanitized_optimizers LIBRARY
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Iterator

from .. import lamb_reference, lars_reference
from . import emulator, optimizers
from .optimizers import CHUNK, SMALL, Lars, Parameter, Problem

SIZES = (0, 1, 37, SMALL, SMALL + 1, CHUNK, 5 * CHUNK + 5)


def problems() -> Iterator[Problem]:
    """Every dtype, with and without masters, aligned or not, of all three kinds of work."""
    for p, g, offset in itertools.product(optimizers.DTYPES, optimizers.DTYPES, (0, 1)):
        master = p != "f32" and g == p
        parameters = [Parameter(n, p, g, offset=offset, master=master) for n in SIZES]
        yield Problem(parameters, [lamb_reference.Options(caution=offset == 1)])
        yield Lars(parameters, [lars_reference.Options(momentum=0.9, nesterov=offset == 1)])
    # One array that no unit fits, among others that units would fit.
    parameters = [
        Parameter(n, "bf16" if apart == "master" else "f32", master=apart == "master", apart=apart)
        for apart in ("p", "g", "m", "v", "master")
        for n in (37, SMALL + 1)
    ]
    yield Problem(parameters)
    yield Lars(parameters, [lars_reference.Options(momentum=0.9)])
    # More sets than a launch takes, and no momentum.
    parameters = [Parameter(40, step=t) for t in range(1, 70)]
    yield Problem(parameters, max_grad_norm=None)
    yield Lars(parameters, max_grad_norm=None)


def main() -> None:
    emulator.Memory.exact = True
    library = optimizers.load(ctypes.CDLL(sys.argv[1]))
    count = 0
    for problem in problems():
        for device in optimizers.DEVICES:
            with optimizers.device(library, device, "random", seed=count):
                optimizers.run(library, problem)
        optimizers.grad_sum_sq(library, problem)
        count += 1
    print(f"ran {count} problems")


if __name__ == "__main__":
    main()
