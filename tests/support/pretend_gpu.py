"""GPUs that are not there: tensors in main memory that say that they are on one.

    with pretend_gpus(2):
        model = model.to("cuda:1")

As on real ones, an operation on tensors of several devices fails, so what forgets to move a tensor
fails here too. Values are computed on the CPU. What this can't show is a GPU's speed and memory,
and how its kernels round. PyTorch computes no gradients on a GPU that is not there; `"pretend"` is
a device for them, after `pretend_device()`, which is for good: in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

KINDS = ("cuda", "pretend")
COMPOSITE = "CompositeImplicitAutograd"  # operations that are made of others

# What takes tensors of several devices: transfers, and indexing by what lies in main memory.
TRANSFERS = {aten._to_copy, aten.copy_, aten._local_scalar_dense}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

FLASH = aten._scaled_dot_product_flash_attention
EFFICIENT = aten._scaled_dot_product_efficient_attention


class GpuTensor(Tensor):
    """A tensor that says that it is on a GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> GpuTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_devices(func, args, kwargs or {})

    # What reads values without an operation.

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __format__(self, how: str) -> str:
        return format(self.held, how)

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"


class PretendDevices(TorchDispatchMode):
    """What is made on a GPU, or moved to one, becomes a `GpuTensor`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_devices(func, args, kwargs or {})


class AnyGenerator(type(torch.Generator)):
    """What was annotated `torch.Generator` meanwhile takes torch's own ones, also afterwards."""

    def __instancecheck__(cls, made: Any) -> bool:
        return isinstance(made, torch._C.Generator)


class Generator(torch.Generator, metaclass=AnyGenerator):
    """Random numbers are drawn in main memory, whatever they are for."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


def on_devices(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check where the tensors are, compute in main memory, and say where the result is."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
        with PretendDevices():
            return func.decompose(*args, **kwargs)
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    place = placed(func.overloadpacket, tensors)
    if kwargs.get("device") is not None:
        place = torch.device(kwargs["device"])
        if place.type in KINDS:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
    # An inference tensor can't be dressed as another.
    with torch.inference_mode(False), torch.set_grad_enabled(False):
        inner_args, inner_kwargs = tree_map_only(GpuTensor, lambda x: x.held, (args, kwargs))
        result = computed(func, inner_args, inner_kwargs)
        if place.type in KINDS:
            place = torch.device(place.type, place.index or 0)
            result = tree_map_only(Tensor, lambda x: GpuTensor(x, place), result)
        elif not any(isinstance(x, GpuTensor) for x in tensors):
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)


def placed(packet: Any, tensors: list[Tensor]) -> torch.device:
    """The device of a result.

    Raises:
        RuntimeError: as PyTorch's, where tensors are on several devices.
    """
    if packet in TRANSFERS:
        return tensors[0].device
    places = [x.device for x in tensors]
    if packet in INDEXING:  # by what may lie in main memory
        places = [places[0], *(place for place in places[1:] if place.type != "cpu")]
    else:  # a number in main memory may meet any tensor
        places = [x.device for x in tensors if x.ndim or x.device.type != "cpu"]
    if len(set(places)) > 1:
        found = ", ".join(sorted({str(place) for place in places}))
        raise RuntimeError(f"Expected all tensors to be on the same device, not {found}: {packet}")
    return places[0] if places else torch.device("cpu")


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation in main memory; what only a GPU has, in other words."""
    packet = func.overloadpacket
    if packet is aten._fused_sdp_choice:
        return int(torch.nn.attention.SDPBackend.MATH.value)
    if packet in (FLASH, EFFICIENT):
        return fused(packet, *args[:3])
    return func(*args, **kwargs)


def fused(packet: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What the kernels of a GPU compute, and what they refuse.

    Flash attention takes half precision, and heads whose size eight divides; the other one rounds
    the number of queries up, in the normaliser.
    """
    if packet is FLASH and q.shape[-1] % 8:
        raise RuntimeError("head_size must be a multiple of 8, this is ensured by padding!")
    if packet is FLASH and q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if any(x.stride(-1) != 1 for x in (q, k, v)) or q.shape[:2] != k.shape[:2]:
        raise RuntimeError("the kernel takes heads in one piece, as many of keys as of queries")
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    out, lse = (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)
    if packet is EFFICIENT:
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    # The rest is for the backward pass.
    seed, offset, nothing = (torch.zeros((), dtype=torch.int64) for _ in range(3))
    if packet is EFFICIENT:
        return out, lse, seed, offset
    return out, lse, nothing, nothing, q.shape[2], k.shape[2], seed, offset, nothing


@contextmanager
def pretend_gpus(n: int = 1, free: int = 2**30) -> Iterator[None]:
    """Pretend that this machine has GPUs.

    Args:
        free: bytes that are left on each.
    """
    values = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": n,
        "current_device": 0,
        "mem_get_info": (free, 2 * free),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "empty_cache": None,
        "get_device_name": "a GPU that is not there",
    }
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, where there is no driver
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, value=value: value))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(moving_through_operations())
        stack.enter_context(PretendDevices())
        yield


@contextmanager
def moving_through_operations() -> Iterator[None]:
    """Let `module.to` exchange parameters, and `torch.tensor` move what it has made."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(before)


def pretend_device() -> None:
    """Make a device called "pretend", for gradients too; for the rest of this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretend")
    torch.autograd.set_multithreading_enabled(False)
