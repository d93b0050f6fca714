"""Batches for large-batch training, collated and gathered by native threads."""

from batchops.data._collate import collate
from batchops.data.loader import DataLoader

__all__ = ["DataLoader", "collate"]
