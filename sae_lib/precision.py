"""Which number format the factors of matrix products may have; sums and weights are float32 everywhere."""

import torch


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def low_precision() -> torch.dtype:
    """bfloat16 where the machine multiplies it natively, else float32."""
    return torch.bfloat16 if torch.cuda.is_available() or native_bfloat16() else torch.float32
