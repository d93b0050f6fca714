"""Fused norms, LAMB and native batch collation for large-batch PyTorch training."""

import pkgutil

# In a checkout beside an installed build, the Python files here serve with the libraries there.
__path__ = pkgutil.extend_path(__path__, __name__)

from . import (
    _binding,  # first: loads the native libraries and registers the operators
    _vmap,
    data,
    functional,
    nn,
    optim,
)
from ._config import show_config
from .convert import convert, revert
from .patch import patch
from .recompute import recompute

_vmap.register()
__version__ = _binding.version()

__all__ = [
    "__version__",
    "convert",
    "data",
    "functional",
    "nn",
    "optim",
    "patch",
    "recompute",
    "revert",
    "show_config",
]
