"""CUDA kernels without a GPU: the shipped sources compiled with g++, CUDA threads as fibers.

To run a kernel file here, write an extern "C" file beside this one (control.h shows the shape) and
load both:

    library = build.library("optimizers", ["csrc/kernels/cuda/lamb.cu", ...], ["optimizer_api.cpp"])
    with emulator.schedule(library, "random", seed=3):
        emulator.call(library.emulated_lamb, ctypes.byref(arguments))

Nothing of this folder is in the wheel.
"""
