"""`push` and `export`: upload a pack to a model hub, and convert it for other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from xfusion.apps.commands.base import Answer, UsageError, Verb, as_folder, load_model, pack_folder, table


@dataclass(frozen=True, kw_only=True)
class Push(Verb):
    """Upload a pack to a model hub, in one commit; its card says what was recorded about it.

    Set the hub and the token as for the hub client: HF_ENDPOINT, HF_TOKEN, or `hf auth login`.
    """

    pack: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PACK")]
    """A folder, or a shipped pack's name."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ORG/NAME")]
    """Target repository; created if missing."""
    revision: str | None = None
    """Branch; None is the main one."""
    private: bool = False
    """Make a new repository private."""
    message: str = "xfusion pack"
    """Commit message."""

    def run(self, console: Console) -> Answer:
        if self.repository.count("/") != 1:
            raise UsageError(f"{self.repository!r} is not a repository such as org/name")
        from xfusion import checkpoint

        console.print(f"checking {self.pack} and putting it on the hub", markup=False)
        address = checkpoint.push(
            pack_folder(self.pack),
            self.repository,
            revision=self.revision,
            private=self.private or None,
            message=self.message,
        )
        revision_suffix = f"@{self.revision}" if self.revision else ""
        rows = [("commit", address), ("try", f'xfusion.load("{self.repository}{revision_suffix}")')]
        return Answer(data={"commit": address, "repository": self.repository}, text=table(rows))


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Write a pack in the format of another library, with the same logits; unsupported models are refused.

    peft: the tower of xfusion_lora (stride 1) as LoRA, the prompts of llama_adapter. transformers: llava and llava_1_5 with
    a vision transformer as LlavaForConditionalGeneration, qwen_audio as VoxtralForConditionalGeneration.
    """

    pack: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PACK")]
    """A folder, a shipped pack's name, or a hub id."""
    to: str
    """peft or transformers."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Output folder; it must be empty or missing."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        del console
        from xfusion.exports.base import export

        as_folder(self.out)
        notes = export(load_model(self.pack, device="cpu", trust=self.trust), self.out, self.to)
        rows = [("written", str(self.out)), *(("note", note) for note in notes)]
        return Answer(data={"out": str(self.out), "to": self.to, "notes": notes}, text=table(rows))
