"""The uploaded files in the page's folder: bounded in total size, and deleted after an hour."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from xfusion.apps.web.desk import KEPT_SECONDS

BLOCK = 4096
"""Bytes counted even for an empty file."""


class Uploads:
    """The uploaded files of a page.

    Args:
        folder: folder of the uploads.
        excluded: a folder within it that does not hold uploads.
        max_bytes: most bytes of all uploads.
    """

    def __init__(self, folder: Path, excluded: Path, max_bytes: int):
        self.folder, self.excluded, self.max_bytes = folder, excluded, max_bytes
        self.num_coming = 0
        """Bytes of uploads in progress."""

    def free_bytes(self) -> int:
        """Bytes that may still be uploaded, counting uploads in progress; files older than an hour are deleted first."""
        old, size = time.time() - KEPT_SECONDS, 0
        for path in self.folder.rglob("*"):
            if self.excluded in path.parents:
                continue
            with suppress(OSError):  # a folder, or deleted meanwhile
                stat = path.stat()
                if path.is_file() and stat.st_mtime < old:
                    path.unlink()
                else:
                    size += max(BLOCK, stat.st_size)
        return self.max_bytes - size
