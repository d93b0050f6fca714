"""Fused norms, LAMB and native batch collation for large-batch PyTorch training."""

from . import (
    _binding,  # first: loads the native libraries and registers the operators
    functional,
    nn,
)
from ._config import show_config
from .convert import convert, revert

__version__ = _binding.version()

__all__ = [
    "__version__",
    "convert",
    "functional",
    "nn",
    "revert",
    "show_config",
]
