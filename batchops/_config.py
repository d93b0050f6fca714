"""What this installation can do, as text."""

from __future__ import annotations

import platform

import torch

from . import _binding


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def show_config() -> str:
    """The build and the machine as text: versions, torch binding, CUDA targets and driver, CPU
    instruction set, threads. Paste it into a bug report."""
    core = _binding.core
    rows = [
        ("batchops", _binding.version()),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("torch binding", _binding.operators.stem),
    ]
    if core.built_with_cuda():
        count, message = core.cuda_device_count()
        driver = core.cuda_driver_version()
        rows += [
            ("CUDA build", f"toolkit {_cuda_version(core.cuda_toolkit_version())}"),
            ("CUDA targets", core.cuda_targets()),
            ("CUDA driver", f"supports {_cuda_version(driver)}" if driver else "none"),
            ("CUDA devices", str(count) if message is None else f"{count} ({message})"),
        ]
    else:
        rows.append(("CUDA build", "no: CPU kernels only; CUDA tensors take torch's own operators"))
    rows += [
        ("CPU capability", core.cpu_capability()),
        ("threads", str(torch.get_num_threads())),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
