"""Batches for large-batch training, collated and gathered by native threads."""

from batchops.data._collate import collate
from batchops.data._threads import get_worker_info
from batchops.data.columns import Columns
from batchops.data.loader import DataLoader

__all__ = ["Columns", "DataLoader", "collate", "get_worker_info"]
