"""`data check`: check pictures and captions before training. `data encode`: run the codec ahead of training. `data
recaption`: new captions for the same pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from xfusion.apps.commands.base import (
    Answer,
    UsageError,
    Verb,
    as_file,
    as_folder,
    choose_device,
    load_model,
    progress,
    size_text,
    table,
)

MAX_PRINTED = 20
"""Problems printed as text; JSON has all."""


@dataclass(frozen=True, kw_only=True)
class DataCheck(Verb):
    """Check every picture and caption of a data source and report problems, with file and line.

    Exits with 1 if there are any.
    """

    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
    """emoji, emoji:128, a folder of pictures with captions, a .jsonl file, shards, hf:ORG/NAME, or a folder of latents."""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Write a contact sheet of the pictures as a model will see them."""
    size: int = 32
    """Side in pixels of the pictures on the sheet: the model's size."""
    base: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """The base whose control tokens no caption may contain; None uses the embedded one, if installed."""

    def run(self, console: Console) -> Answer:
        from xfusion.data.sources import check

        if self.size < 1:
            raise UsageError(f"--size {self.size}: pictures on a sheet have a side of at least 1 pixel")
        if self.sheet:
            as_file(self.sheet)
        tokens, note = _special_tokens(self.base)
        with console.status(f"looking at {self.spec}") if console.is_terminal else _no_status():
            report = check(self.spec, special_tokens=tokens)
        data = report.to_json()
        data["notes"] += [note] if note else []
        if self.sheet:
            data["sheet"] = str(report.sheet(self.sheet, size=self.size))
        return Answer(data=data, text=_text(data), code=1 if report.num_bad else 0)


@dataclass(frozen=True, kw_only=True)
class DataEncode(Verb):
    """Encode all pictures of a data source ahead of training; the folder is a data source that trains like the pictures.

    Repeat the command after an interruption: finished shards are kept.
    """

    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
    """emoji, emoji:128, a folder of pictures with captions, a .jsonl file, or shards."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder of the latents."""
    codec: Annotated[str, tyro.conf.arg(metavar="NAME[:SOURCE[:SUBFOLDER]]")] = "pixels"
    """The codec, as in --model.image.codec of train."""
    size: int = 32
    """Side in pixels."""
    split: Literal["train", "held", "all"] = "train"
    """Which pictures, if some are held out."""
    allow_bad: float = 0.0
    """Fraction of bad examples that is skipped instead of stopping, such as 0.05."""
    batch: int = 1
    """Pictures per call of the codec: 1 gives bit for bit what training would compute, more is faster on a GPU."""
    workers: int = 1
    """Processes that share the work."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    base: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """The base whose control tokens no caption may contain; None uses the embedded one, if installed."""

    def run(self, console: Console) -> Answer:
        from xfusion.apps.commands.recipe import read_codec
        from xfusion.data.latents import encode, left_out_before
        from xfusion.data.sources import open_source

        if self.batch < 1 or self.workers < 1:
            raise UsageError(f"--batch {self.batch} and --workers {self.workers}: at least 1 each")
        as_folder(self.out)
        try:
            codec = read_codec(self.codec)
        except ValueError as error:
            raise UsageError(str(error)) from error
        device, tokens = choose_device(self.device), _special_tokens(self.base)[0]
        source = open_source(
            self.spec,
            split=self.split,
            allow_bad=self.allow_bad,
            special_tokens=tokens,
            unreadable=left_out_before(self.out),
        )
        with progress(console) as report_progress:
            latents = encode(
                source,
                codec,
                self.size,
                self.out,
                batch=self.batch,
                workers=self.workers,
                device=device,
                allow_bad=self.allow_bad,
                progress=lambda done, total: report_progress("encoding", done, total),
            )
        size = sum(shard["bytes"] for shard in latents.shards)
        data = {
            "out": str(self.out),
            "pictures": len(latents),
            "size": latents.size,
            "codec": latents.codec,
            "shards": len(latents.shards),
            "bytes": size,
            "left_out": [*latents.left_out.values()],
        }
        rows = [
            *(("left out", reason) for reason in latents.left_out.values()),
            ("latents", f"{self.out}: {len(latents)} pictures of {latents.size} px in {len(latents.shards)} shards"),
            ("codec", f"{latents.codec['class']} {latents.codec['fingerprint'][:16]}"),
            ("size", size_text(size)),
            ("train", f"xfusion train RECIPE --data {self.out} --model.image.codec {self.codec}"),
        ]
        return Answer(data=data, text=table(rows))


@dataclass(frozen=True, kw_only=True)
class DataRecaption(Verb):
    """Recaption the pictures of a data source with a pack, a vision-language model, or a server with OpenAI's API.

    The folder is a data source: the new caption first, the old ones as further wordings. Its recaption.jsonl records which
    model and prompt wrote every caption. Repeat the command after an interruption: finished captions are kept.
    """

    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
    """emoji, emoji:128, a folder of pictures with captions, a .jsonl file, or shards."""
    by: Annotated[str, tyro.conf.arg(name="with", metavar="PACK|hf:MODEL|URL")]
    """A pack that captions; a vision-language model of transformers, such as hf:Qwen/Qwen2.5-VL-3B-Instruct[@REVISION] or
    hf:FOLDER; or the address of a server, such as http://127.0.0.1:8000/v1."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder of pictures and captions."""
    model: str | None = None
    """Which of the server's models."""
    prompt: str | None = None
    """Prompt for each picture, may be empty; None asks hf: for several sentences, others for one."""
    size: int = 256
    """Side in pixels at which pictures are shown to the model and stored."""
    max_tokens: int | None = None
    """Longest caption in tokens; None is 256 for hf:, and 64 for others."""
    batch: int = 1
    """Pictures per call of hf:; more is faster on a GPU."""
    per_minute: float | None = None
    """Maximum requests per minute."""
    retries: int = 5
    """Retries of a request when the server is busy or the connection fails, waiting longer each time."""
    split: Literal["train", "held", "all"] = "all"
    """Which pictures, if some are held out."""
    device: str = "auto"
    """auto, cpu, cuda, ...; for a pack or hf:."""
    trust: bool = False
    """Import packages outside xfusion that the pack names."""

    def run(self, console: Console) -> Answer:
        import os

        from xfusion.data.recaption import JOURNAL, LONG, Asking, endpoint, recaption
        from xfusion.data.sources import open_source
        from xfusion.generation import refuse_to_read

        local = self.by.startswith("hf:")
        max_tokens = (256 if local else 64) if self.max_tokens is None else self.max_tokens
        prompt = (LONG if local else "Describe this picture in one sentence.") if self.prompt is None else self.prompt
        if self.size < 1 or max_tokens < 1 or self.retries < 0 or self.batch < 1:
            raise UsageError("--size, --max-tokens and --batch are at least 1, --retries at least 0")
        if self.batch > 1 and not local:
            raise UsageError(f"--batch {self.batch}: only a model by hf: is asked about several pictures at once")
        if self.per_minute is not None and not 0 < self.per_minute < float("inf"):
            raise UsageError(f"--per-minute {self.per_minute:g}: more than 0")
        as_folder(self.out)
        if self.by.startswith(("http://", "https://")):
            if self.model is None:
                raise UsageError("--with a server: name its model, by --model")
            name, key = f"{self.model} at {self.by}", os.environ.get("OPENAI_API_KEY", "none")
            ask = endpoint(self.by, self.model, key=key, max_tokens=max_tokens)
        elif local:
            from xfusion.evaluation.adapters.transformers import captioner

            name, ask = captioner(self.by[3:], device=choose_device(self.device), max_tokens=max_tokens)
        else:
            pack = load_model(self.by, device=self.device, trust=self.trust)
            refuse_to_read(pack)
            name = f"{self.by} {pack.fingerprint}"

            def ask_pack(pictures: list[Any], prompt: str) -> list[str]:
                return pack.caption(pictures, question=prompt, max_tokens=max_tokens)

            ask = ask_pack

        source = open_source(self.spec, split=self.split)
        request_limits = {"per_minute": self.per_minute, "retries": self.retries}
        settings = Asking(model=name, prompt=prompt, size=self.size, batch=self.batch, **request_limits)
        with progress(console) as report_progress:
            result = recaption(
                source, ask, settings, self.out, progress=lambda done, total: report_progress("captioning", done, total)
            )
        rows = [
            ("captions", f"{self.out}: {result.captions}, of which {result.asked} were asked for now"),
            *_skipped_rows(result.skipped),
            ("record", str(self.out / JOURNAL)),
            ("train", f"xfusion train RECIPE --data {self.out}"),
        ]
        data = {
            "out": str(self.out),
            "captions": result.captions,
            "asked": result.asked,
            "skipped": result.skipped,
            "model": name,
        }
        return Answer(data=data, text=table(rows))


def _skipped_rows(skipped: list[str]) -> list[tuple[str, str]]:
    """Rows about pictures without a caption."""
    if not skipped:
        return []
    rows = [("left out", f"{len(skipped)} without a caption; the same command asks for them again")]
    rows += [("", line) for line in skipped[:MAX_PRINTED]]
    return rows + (
        [("", f"... and {len(skipped) - MAX_PRINTED} more (--json has all)")] if len(skipped) > MAX_PRINTED else []
    )


def _special_tokens(base: str | None) -> tuple[tuple[str, ...], str]:
    from xfusion.backbone import EMBEDDED, special_tokens
    from xfusion.data.sequence import XFusionError

    try:
        return special_tokens(base or EMBEDDED), ""
    except XFusionError:
        if base:
            raise
        return (), "captions were not searched for a base's control tokens: name one with --base"


def _no_status():
    from contextlib import nullcontext

    return nullcontext()


def _text(data: dict) -> str:
    captions = data["captions"]
    rows = [
        ("source", data["spec"]),
        ("licence", data["licence"]),
        ("examples", f"{data['num_examples']}, {data['num_bad']} of them bad ({100 * data['share_bad']:.1f} %)"),
        ("groups", f"{data['num_groups']} of pictures that count as the same"),
        (
            "captions",
            f"{captions['num_captions']}; {captions['shortest']} to {captions['longest']} characters,"
            f" median {captions['median']:g}",
        ),
    ]
    rows += [(f"  {kind}", str(count)) for kind, count in data["counts"].items()]
    lines = [table(rows), *data["problems"][:MAX_PRINTED]]
    if len(data["problems"]) > MAX_PRINTED:
        lines.append(f"... and {len(data['problems']) - MAX_PRINTED} more (--json has all)")
    lines += [f"note: {note}" for note in data["notes"]]
    if "sheet" in data:
        lines.append(f"sheet: {data['sheet']}")
    return "\n".join(lines)
