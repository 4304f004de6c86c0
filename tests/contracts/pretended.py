"""A device that computes on the CPU and refuses what a GPU would: an operation on tensors of two devices and, as Apple's GPUs
do, float64.

Tensors on it hold CPU tensors, and say that they lie elsewhere. What a GPU allows beside its own tensors is allowed: scalars,
indices on the CPU, and copies. It finds code that forgets a device; kernels, precision and speed of a GPU it cannot show.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from xfusion.backbone import Backbone

PRETENDED = torch.device("meta")
"""The one type beside the CPU that torch can name without a library for it; nothing here computes without values."""
_ACROSS = {
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class Elsewhere(Tensor):
    """A CPU tensor that says it lies on the pretended device."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor) -> Elsewhere:
        layout = content.stride(), content.storage_offset()
        return Tensor._make_wrapper_subclass(cls, content.shape, *layout, dtype=content.dtype, device="cpu")  # type: ignore[attr-defined]

    def __init__(self, content: Tensor):
        if content.dtype == torch.float64:
            raise TypeError("an Apple GPU has no float64: copy to the CPU first")
        self.content = content.detach()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return PRETENDED

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.content!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch would do at once with the memory of a CPU tensor, and a GPU does by a copy or not at all."""
        kwargs = kwargs or {}
        if func is Tensor.numpy:
            raise TypeError("can't convert a tensor of another device to numpy: copy it to the CPU first")
        if func is Tensor.tolist:
            return args[0].content.tolist()
        if func in (functional.one_hot, Tensor.quantile):  # torch makes a table for them, where a tensor really lies
            return Elsewhere(func(args[0].content, *args[1:], **kwargs))
        if func in (Tensor.cpu, Tensor.to) and isinstance(args[0], Elsewhere):
            others = (*args[1:], *kwargs.values())
            devices = [torch.device(a) for a in others if isinstance(a, (str, torch.device))]
            devices += [a.device for a in others if isinstance(a, Tensor)]
            if func is Tensor.cpu or [device.type for device in devices] == ["cpu"]:
                return args[0].content.to(*(a for a in others if isinstance(a, torch.dtype))).clone()
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


class _Values(TorchFunctionMode):
    """Tensors from Python values, which torch makes without asking a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == PRETENDED:
            return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class _Moves(TorchDispatchMode):
    """Tensors that are created on the pretended device, or moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


def _dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the real tensors; its results lie where its tensors do, or where it was told to put them."""
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    if there and func not in _ACROSS:
        here = [tuple(t.shape) for t in tensors if not isinstance(t, Elsewhere) and t.ndim]
        assert not here, f"{func} of tensors on {PRETENDED} and of {here} on the CPU"
    if (target := kwargs.get("device")) is not None:
        there = torch.device(target) == PRETENDED
        kwargs = {**kwargs, "device": "cpu", **({"pin_memory": False} if "pin_memory" in kwargs else {})}
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    results = func(*_content(args), **{name: _content(value) for name, value in kwargs.items()})
    if not there:
        return results
    results = _elsewhere(results)
    return return_and_correct_aliasing(func, args, kwargs, results)


# By hand: of an operation on tiny tensors, torch's own walks through its arguments are most of the time.


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _content(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.content
    return type(value)(map(_content, value)) if type(value) in (list, tuple) else value


def _elsewhere(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Elsewhere(value)
    return type(value)(map(_elsewhere, value)) if type(value) in (list, tuple) else value


class _AtOnce:
    """A pool whose work is done by the caller: modes of torch are of one thread."""

    map = staticmethod(map)

    def __init__(self, *_: Any, **__: Any): ...

    def submit(self, work: Any, *args: Any) -> Future:
        done: Future = Future()
        done.set_result(work(*args))
        return done

    def shutdown(self, *_: Any, **__: Any) -> None: ...


def moved(base: Backbone) -> Backbone:
    """A copy of a base on the pretended device; to be called within `one_more_device`."""
    model = copy.deepcopy(base.model).to(PRETENDED)
    return Backbone(model, base.tokenizer, base.source, pretrained=base.pretrained)


@contextmanager
def one_more_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the ``with`` block there is the pretended device. What torch refuses by the name of a device is left out: fused
    kernels of optimizers, autocast, inference mode.
    """
    autocast, adamw = torch.autocast, torch.optim.AdamW
    with monkeypatch.context() as patched, _Values(), _Moves():
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved parameter is of another class
        patched.setattr("xfusion.data.mixture.ThreadPoolExecutor", _AtOnce)
        patched.setattr(torch.optim, "AdamW", lambda *a, **k: adamw(*a, **{**k, "fused": False, "foreach": False}))
        patched.setattr(torch, "inference_mode", torch.no_grad)
        patched.setattr(
            torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k)
        )
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
