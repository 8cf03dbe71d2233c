"""A GPU that is pretended on a CPU, for what can be wrong without one: tensors on two devices, and a host that waits.

Tensors are real and lie in host memory, but a storage carries a label, and whoever asks such a tensor for its device is told
``cuda:0``. What a GPU refuses raises :class:`WrongDeviceError` with the line: an operation or a collective over tensors of both,
NumPy on a device's tensor. What makes the host wait for the device is counted with the line: a number read, a copy from ordinary
memory, an index that must be counted first.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils._device import _device_constructors
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype as group_by_device
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mrpo_scale.base import ranks

GPU = torch.device("cuda", 0)
Base: Any = torch._C.TensorBase
#: The ways to make a tensor on a device; whether they take what the host has, and so copy it.
MAKERS = {
    **dict.fromkeys(("zeros", "ones", "empty", "full", "arange", "linspace", "rand", "randn"), False),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), False),
    **dict.fromkeys(("tensor", "as_tensor"), True),
}
NEW = {"new_zeros": False, "new_ones": False, "new_empty": False, "new_full": False, "new_tensor": True}
COPIES = ("aten::copy_", "aten::_to_copy", "aten::set_")
INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
#: Operations whose result the host needs before it can go on.
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)


class WrongDeviceError(RuntimeError):
    """What a GPU would have refused."""


class PretendedGpu(TorchDispatchMode):
    """``with PretendedGpu() as gpu``: from here on ``cuda`` is a device.

    Attributes:
        waits: (what, line) -> how often the host would have waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._labels: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._undo: list[Callable[[], None]] = []

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor is on the device."""
        return _listed(tensor, self._labels)

    def put(self, tensor: Tensor) -> Tensor:
        _list(tensor, self._labels)
        return tensor

    def reads(self) -> int:
        """How often the host has waited so far."""
        return sum(self.waits.values())

    # ---- every operation ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if self.has(x)]
        host = [x for x in tensors if x.ndim and not x.is_meta and not self.has(x)]
        if func.namespace == "c10d":
            self._check_collective(name, args, tensors, here)
        elif here and host and name not in COPIES:
            if name not in INDEXED or not self.has(args[0]):
                self._refuse(f"{name} of {', '.join(map(self._describe, tensors))}")
            self._wait("index from the host")
        if here and self._reads(name, args, kwargs):
            self._wait(name.removeprefix("aten::"))
        if name == "aten::copy_" and len(here) == 1 and not (len(args) > 2 and args[2]):
            self._wait("copy")
        result = func(*args, **kwargs)
        if here and not name.startswith("aten::_local_scalar_dense"):
            for x in tree_leaves(result):
                # Of a copy to the host only the target is not on the device.
                if isinstance(x, Tensor) and (name not in COPIES or x is not args[0]):
                    self.put(x)
        return result

    def _reads(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        plain = name.removeprefix("aten::")
        if name in INDEXED:
            return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))
        if plain == "segment_reduce":
            return not kwargs.get("unsafe")
        if plain == "repeat_interleave":
            return kwargs.get("output_size") is None
        return plain in READS

    def _check_collective(self, name: str, args: Any, tensors: list[Tensor], here: list[Tensor]) -> None:
        """A control group takes tensors of the host, every other group those of the device."""
        groups = [x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())]
        control = any(dist.ProcessGroup.unbox(group) in ranks._control.values() for group in groups)
        if name != "c10d::barrier" and len(here) != (0 if control else len(tensors)):
            kind = "control" if control else "device's"
            self._refuse(f"{name} over a {kind} group of {', '.join(map(self._describe, tensors))}")

    def _describe(self, tensor: Tensor) -> str:
        return f"{'cuda' if self.has(tensor) else 'cpu'} {str(tensor.dtype)[6:]}{list(tensor.shape)}"

    def _refuse(self, what: str) -> None:
        raise WrongDeviceError(f"{what} at {_line()}")

    def _wait(self, why: str) -> None:
        self.waits[why, _line()] += 1

    # ---- what Python asks and makes ----------------------------------------------------------------------------------

    def __enter__(self) -> PretendedGpu:
        _device_constructors()  # remembered by torch, which must not be what is put in their place here
        self._patch(Tensor, "device", property(lambda x: GPU if self.has(x) else Base.device.__get__(x)))
        self._patch(Tensor, "is_cuda", property(self.has))
        self._patch(Tensor, "to", lambda x, *args, **kwargs: self._to(x, *args, **kwargs))
        self._patch(Tensor, "cpu", lambda x: self._to(x, "cpu"))
        self._patch(Tensor, "cuda", lambda x, *_: self._to(x, GPU))
        self._patch(Tensor, "pin_memory", lambda x, *_: self._pin(x))
        for key in ("numpy", "__array__"):
            self._patch(Tensor, key, self._numpy(getattr(Tensor, key)))
        self._patch(Tensor, "tolist", self._list_of(Base.tolist))
        for key, from_host in MAKERS.items():
            self._patch(torch, key, self._maker(getattr(torch, key), from_host))
        for key, from_host in NEW.items():
            self._patch(Tensor, key, self._maker(getattr(Base, key), from_host))
        for key, value in _CUDA.items():
            self._patch(torch.cuda, key, value)
        for module in (clip_grad, optimizer):
            self._patch(module, "_group_tensors_by_device_and_dtype", self._grouped)
        self._patch(ranks, "takes_host_tensors", lambda group: group is None or group in ranks._control.values())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._undo:
            self._undo.pop()()

    def _patch(self, owner: Any, key: str, value: Any) -> None:
        if key in vars(owner):
            before = vars(owner)[key]
            self._undo.append(lambda: setattr(owner, key, before))
        else:
            self._undo.append(lambda: delattr(owner, key))
        setattr(owner, key, value)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        non_blocking = kwargs.pop("non_blocking", False)
        if args and isinstance(args[0], Tensor):
            device, args = args[0].device, (args[0].dtype, *args[1:])
        elif args and (args[0] is None or isinstance(args[0], (str, torch.device))):
            device, args = args[0], args[1:]
        dtype = next((x for x in args if isinstance(x, torch.dtype)), kwargs.pop("dtype", None)) or tensor.dtype
        if device is None or torch.device(device).type == tensor.device.type:
            return Base.to(tensor, dtype, **kwargs)
        if torch.device(device).type == "meta":
            return Base.to(tensor, "meta", dtype, **kwargs)
        there = torch.device(device).type == "cuda"
        if not (non_blocking and there and _listed(tensor, self._pinned)):
            self._wait("copy to the device" if there else "copy to the host")
        moved = Base.to(Base.clone(tensor), dtype)
        if there:
            return self.put(moved)
        self._labels.pop(Base.untyped_storage(moved)._cdata, None)
        return moved

    def _pin(self, tensor: Tensor, *_: Any) -> Tensor:
        if self.has(tensor):
            self._refuse("pin_memory of a tensor of the device")
        copy = Base.clone(tensor)
        _list(copy, self._pinned)
        return copy

    def _numpy(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.has(tensor):
                self._refuse("NumPy of a tensor of the device")
            return function(tensor, *args, **kwargs)

        return ask

    def _grouped(self, tensors: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
        """torch's, which asks below Python where a tensor is."""
        return {
            (GPU if self.has(lists[0][0]) else device, dtype): (lists, indices)
            for (device, dtype), (lists, indices) in group_by_device(tensors, with_indices).items()
        }

    def _list_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(tensor: Tensor) -> Any:
            if self.has(tensor):
                self._wait("tolist")
                with _disable_current_modes():
                    return function(tensor)
            return function(tensor)

        return ask

    def _maker(self, function: Callable[..., Tensor], from_host: bool) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            device = kwargs.get("device")
            like = args[0] if args and isinstance(args[0], Tensor) and not from_host else None
            like = args[0] if function.__name__ == "new_tensor" else like
            there = like is not None and self.has(like) if device is None else torch.device(device).type == "cuda"
            if device is not None and torch.device(device).type != "meta":
                kwargs["device"] = "cpu"
            pinned = kwargs.pop("pin_memory", False)
            result = function(*args, **kwargs)
            if there:
                if from_host:
                    self._wait("tensor made of the host's numbers")
                self.put(result)
            else:
                self._labels.pop(Base.untyped_storage(result)._cdata, None) if not result.is_meta else None
            if pinned:
                _list(result, self._pinned)
            return result

        make.__name__ = function.__name__
        return make


class _Event:
    """Of a device that is never behind."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


_CUDA: dict[str, Any] = {
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda *_: None,
    "get_device_capability": lambda *_: (7, 5),  # no Triton: its kernels have tests of their own
    "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
    "max_memory_allocated": lambda *_: 0,
    "Event": _Event,
}


def _list(tensor: Tensor, labels: dict[int, StorageWeakRef]) -> None:
    if not tensor.is_meta:
        storage = Base.untyped_storage(tensor)
        labels[storage._cdata] = StorageWeakRef(storage)


def _listed(tensor: Tensor, labels: dict[int, StorageWeakRef]) -> bool:
    try:
        label = labels.get(Base.untyped_storage(tensor)._cdata)
    except (NotImplementedError, RuntimeError):
        return False
    return label is not None and not label.expired()


def _line() -> str:
    """Where this package is, or else who calls torch."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    ours = [frame for frame in frames if "/mrpo_" in frame.filename]
    others = [frame for frame in frames if "/torch/" not in frame.filename]
    frame = (ours or others)[-1]
    return f"{frame.filename.split('site-packages/')[-1]}:{frame.lineno} {(frame.line or '').strip()[:90]}"


@contextmanager
def world_of_one() -> Iterator[None]:
    """A process group of this process alone, so that collectives are made."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        ranks._control.clear()
        dist.destroy_process_group()
