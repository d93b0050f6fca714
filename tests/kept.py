"""What tests compile is kept under build/, and shared by processes that test at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Other processes and threads wait, and then find what they need."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget_old(folder: Path, seconds: float = 24 * 3600) -> None:
    """Removes what `folder` holds that was not written for so long."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another has just renamed or removed it
            if path.stat().st_mtime >= time.time() - seconds:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
