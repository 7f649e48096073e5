"""The processor at hand: its name and the instruction sets that decide how fast products are."""

import contextlib
import platform
from functools import cache
from pathlib import Path

# flag of Linux' /proc/cpuinfo, or torch's, -> name
INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "amx_fp16": "AMX-FP16",
    "asimd": "NEON",
    "asimdhp": "FP16",
    "neon": "NEON",
    "fp16_arith": "FP16",
    "bf16": "BF16",
    "sve": "SVE",
}
# entries of the same file: the first two on x86, the others on ARM, where there is no name
NUMBERS = {
    "family": "cpu family",
    "model": "model",
    "implementer": "CPU implementer",
    "part": "CPU part",
}


@cache
def _facts():
    """The entries of the first processor of /proc/cpuinfo; {} where there is no such file."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def name():
    """Its name, with the numbers that tell apart different ones of the same name."""
    facts = _facts()
    known = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {facts[of]}" for key, of in NUMBERS.items() if of in facts]
    return f"{known} ({', '.join(numbers)})" if numbers else known


def instructions():
    """Names of its instruction sets, of those in INSTRUCTIONS; [] where they are not known."""
    facts = _facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split() or _known_to_torch()
    there = {flag.replace("_", "") for flag in flags}
    return [known for flag, known in INSTRUCTIONS.items() if flag.replace("_", "") in there]


def _known_to_torch():
    """Flags that torch finds on systems other than Linux; [] before torch 2.10."""
    import torch

    facts = getattr(torch.cpu, "get_capabilities", dict)()
    return [flag for flag, value in facts.items() if value is True]
