"""In which type a training computes: autocast, and what goes with it on a CPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def autocast_type(precision: str, device: str) -> torch.dtype | None:
    """The autocast type, or None for plain float32; ``auto`` asks whether the device has bfloat16 units."""
    if precision == "auto":
        if device.startswith("cuda"):
            native = torch.cuda.is_bf16_supported()
        else:
            able = torch.cpu.get_capabilities()
            native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == "bfloat16" else None


@contextmanager
def arithmetic(device: str, cast: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``cast`` (None: nothing). On a CPU attention then is plain matrix products.

    The CPU's fused kernel is slow backwards in bfloat16: a step of ``tiny`` took 0.95 s in float32, 0.80 s in
    bfloat16 and 0.60 s so (of ``demo`` 194, 207 and 139 ms; one core, 256 samples).
    """
    if cast is None:
        yield
        return
    with torch.autocast(device.split(":")[0], dtype=cast), attention_kernels(device, cast):
        yield


def attention_kernels(device: str, cast: torch.dtype | None) -> AbstractContextManager[None]:
    """Which kernels attention may run, see ``arithmetic``; autocast aside, activations that were not kept are
    computed under it again."""
    narrow_on_cpu = cast is not None and device.split(":")[0] == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if narrow_on_cpu else nullcontext()
