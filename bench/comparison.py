"""Which ratios of a run are worse than those of a saved one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import case_label, key, load

Record = Mapping[str, Any]

# A ratio may be this much lower: what the medians of two runs differ by on a machine at rest.
TOLERANCE = 0.05


class Change(NamedTuple):
    """A row's ratio to one peer, in the saved run and in this one, with quartiles."""

    record: Record
    peer: str
    before: float
    after: float
    regressed: bool

    def __str__(self) -> str:
        return (
            f"{self.record['op']}, {case_label(self.record)}, {self.record['threads']} threads, "
            f"{self.record['allocator']}, × {self.peer}: {self.before:.2f} -> {self.after:.2f}"
        )


def saved_records(path: Path) -> list[Record]:
    """Of a report.json or a file of --benchmark-json."""
    stored = json.loads(path.read_text())
    if "records" in stored:
        return stored["records"]
    if "benchmarks" in stored:
        return [record for record in load([path])[1] if "ratio" in record]
    raise SystemExit(
        f"compare: expected {path} to be a report.json or a file of --benchmark-json, found "
        f"neither records nor benchmarks in it"
    )


def compare(
    saved: Sequence[Record], records: Sequence[Record], tolerance: float = TOLERANCE
) -> list[Change]:
    """A change for each ratio that both runs have.

    A regression is a median lower by more than ``tolerance`` whose upper quartile does not reach
    the saved run's lower one: so a row that scatters more than it changed is none.
    """
    before = {key(record): record for record in saved}
    changes = []
    for record in records:
        old = before.get(key(record))
        for peer, ratio in record["ratio"].items():
            if old is None or peer not in old["ratio"]:
                continue
            was = old["ratio"][peer]
            apart = record["ratio_quartiles"][peer][1] < old["ratio_quartiles"][peer][0]
            regressed = apart and ratio < was * (1 - tolerance)
            changes.append(Change(record, peer, was, ratio, regressed))
    return changes


def summary(changes: Sequence[Change]) -> str:
    worse = [change for change in changes if change.regressed]
    lines = [f"{len(changes)} ratios compared, {len(worse)} regressed"]
    return "\n".join([*lines, *(f"  {change}" for change in worse)])
