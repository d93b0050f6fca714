"""Batches for large-batch training: a DataLoader that gathers on native threads."""

from batchops.data.loader import DataLoader

__all__ = ["DataLoader"]
