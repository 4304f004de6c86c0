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
        beside: a folder within it that does not hold uploads.
        most: most bytes of all uploads.
    """

    def __init__(self, folder: Path, beside: Path, most: int):
        self.folder, self.beside, self.most = folder, beside, most
        self.coming = 0
        """Bytes of uploads in progress."""

    def room(self) -> int:
        """Bytes that may still be uploaded, counting uploads in progress; files older than an hour are deleted first."""
        old, size = time.time() - KEPT_SECONDS, 0
        for path in self.folder.rglob("*"):
            if self.beside in path.parents:
                continue
            with suppress(OSError):  # a folder, or deleted meanwhile
                found = path.stat()
                if path.is_file() and found.st_mtime < old:
                    path.unlink()
                else:
                    size += max(BLOCK, found.st_size)
        return self.most - size
