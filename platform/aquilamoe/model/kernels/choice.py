"""Which implementation computes attention and experts: named by the configuration, or the measured default."""

from dataclasses import dataclass
from typing import Literal

AttentionKernel = Literal["sdpa", "explicit"]
ExpertsKernel = Literal["grouped", "loop"]

EXPLICIT_UP_TO = 1024  # tokens, on a CPU: see docs/performance.md; the softmax that it keeps grows with the square


@dataclass(frozen=True)
class Kernels:
    """What the configuration requests; `auto` is what was measured to be the fastest. All compute the same function."""

    attention: Literal["auto"] | AttentionKernel = "auto"
    experts: Literal["auto"] | ExpertsKernel = "auto"

    def attention_on(self, device_type: str, length: int) -> AttentionKernel:
        """The attention for sequences of `length` tokens on a device ("cpu", "cuda")."""
        if self.attention != "auto":
            return self.attention
        return "explicit" if device_type == "cpu" and length <= EXPLICIT_UP_TO else "sdpa"

    def experts_on(self, device_type: str) -> ExpertsKernel:
        """How experts are computed on a device ("cpu", "cuda"): see benchmarks/experts.py."""
        if self.experts != "auto":
            return self.experts
        return "loop" if device_type == "cpu" else "grouped"

    def describe(self, device_type: str, length: int, is_moe: bool = False) -> str:
        """What is used, and whether it was requested; for the log."""
        of = f"{device_type}, {length} tokens"
        text = f"attention {self.attention_on(device_type, length)} ({_source(self.attention)} for {of})"
        if is_moe:
            text += f", experts {self.experts_on(device_type)} ({_source(self.experts)} for {device_type})"
        return text


def _source(setting: str) -> str:
    return "measured default" if setting == "auto" else "configured"
