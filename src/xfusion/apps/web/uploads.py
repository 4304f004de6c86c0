"""What lies in the page's folder because somebody uploaded it: bounded in all, and gone after an hour."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from xfusion.apps.web.desk import KEPT_SECONDS

BLOCK = 4096
"""Bytes that even an empty file takes."""


class Uploads:
    """The uploaded files of a page.

    Args:
        folder: where they lie.
        beside: a folder within it that is somebody else's.
        most: bytes of them in all.
    """

    def __init__(self, folder: Path, beside: Path, most: int):
        self.folder, self.beside, self.most = folder, beside, most
        self.coming = 0
        """Bytes of those on their way."""

    def room(self) -> int:
        """Bytes that may still come, those on their way included; what is an hour old goes first."""
        old, size = time.time() - KEPT_SECONDS, 0
        for path in self.folder.rglob("*"):
            if self.beside in path.parents:
                continue
            with suppress(OSError):  # a folder, or gone meanwhile
                found = path.stat()
                if path.is_file() and found.st_mtime < old:
                    path.unlink()
                else:
                    size += max(BLOCK, found.st_size)
        return self.most - size
