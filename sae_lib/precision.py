"""Where training runs, and which number format the factors of its products have; sums and weights are float32 everywhere."""

import torch


def best_device() -> torch.device:
    """This process's GPU if there is one, else the processor."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def low_precision(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    on_gpu = torch.device(device).type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else native_bfloat16()
    return torch.bfloat16 if native else torch.float32
