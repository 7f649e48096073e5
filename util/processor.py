"""The processor at hand: its name and the instruction sets that decide how fast products are."""

import contextlib
import platform
from functools import cache
from pathlib import Path

# flag of Linux' /proc/cpuinfo -> name
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
    "bf16": "BF16",
    "sve": "SVE",
}
NUMBERS = {"family": "cpu family", "model": "model"}  # entries of the same file


@cache
def _facts():
    """The entries of the first processor of /proc/cpuinfo; {} where there is no such file."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def name():
    """Its name, with the numbers of family and model, since different ones share a name."""
    facts = _facts()
    known = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {facts[of]}" for key, of in NUMBERS.items() if of in facts]
    return f"{known} ({', '.join(numbers)})" if numbers else known


def instructions():
    """Names of its instruction sets, of those in INSTRUCTIONS; [] where they are not known."""
    facts = _facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return [known for flag, known in INSTRUCTIONS.items() if flag in flags]
