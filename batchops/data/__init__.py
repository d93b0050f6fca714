"""Batches for large-batch training, collated and gathered by native threads."""

from batchops.data._collate import collate
from batchops.data._threads import get_worker_info
from batchops.data.collator import Collator, Pack, Pad
from batchops.data.columns import Columns
from batchops.data.loader import DataLoader
from batchops.data.normalize import Normalize
from batchops.data.padding import Packed, Padded, pack, pad
from batchops.data.samplers import (
    BucketBatchSampler,
    MixtureBatchSampler,
    TokenBudgetBatchSampler,
)

__all__ = [
    "BucketBatchSampler",
    "Collator",
    "Columns",
    "DataLoader",
    "MixtureBatchSampler",
    "Normalize",
    "Pack",
    "Packed",
    "Pad",
    "Padded",
    "TokenBudgetBatchSampler",
    "collate",
    "get_worker_info",
    "pack",
    "pad",
]
