"""`web`: use packs in a browser."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, load_models
from xfusion.apps.commands.serve import address_of, check_limits, listen, serve_until_stopped
from xfusion.apps.server.limits import Limits


@dataclass(frozen=True, kw_only=True)
class Web(Verb):
    """Show packs in a browser: chat, a gallery, pictures dropped on the page, a look inside, comparisons.

    The page fetches nothing from other hosts and sends nothing to them. Uploads and drawings are stored in a temporary
    folder that is deleted when the page stops, by Ctrl-C or SIGTERM. There are no keys: anyone who reaches the port can
    use it.
    """

    packs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PACK...")]
    """Folders, shipped packs' names, or hub ids."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 means all network interfaces."""
    port: int = 7860
    """Port to listen on; 0 picks a free one."""
    comparisons: Path = Path("comparison")
    """Folder of comparisons to show, if it exists."""
    limits: Limits = field(default_factory=Limits)
    """Limits of requests."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    trust: bool = False
    """Import packages outside xfusion that a pack names."""

    def run(self, console: Console) -> Answer:
        if not self.packs:
            raise UsageError("name at least one pack to show, such as emoji")
        check_limits(self.limits)
        with listen(self.host, self.port) as listener, tempfile.TemporaryDirectory(prefix="xfusion-web-") as folder:
            try:
                from xfusion.apps.server.names import own_names
                from xfusion.apps.web import page
            except ImportError as error:
                raise UsageError(f"web needs the package {error.name}: pip install 'xfusion[web]'") from error
            models = load_models(self.packs, device=self.device, trust=self.trust)
            comparisons = self.comparisons if self.comparisons.is_dir() else None
            app = page.create(models, self.limits, Path(folder), comparisons, own_names(self.host))
            address = address_of(self.host, listener)
            console.print(f"open {address} in a browser; Ctrl-C stops", markup=False, soft_wrap=True)
            minutes = serve_until_stopped(app, listener, self.limits)
        return Answer(data={"address": address, "models": list(models)}, text=f"shown for {minutes:.1f} minutes")
