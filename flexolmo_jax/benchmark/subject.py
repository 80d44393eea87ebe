"""What is measured, as a worker sees it."""

import dataclasses
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Spec:
    """Names what a worker measures.

    Attributes:
      side: "flexolmo" or "transformers".
      step: "anchor", "expert", "joint", "router" or "decode".
      config: the configuration, as JSON gives it back.
      experts: transformers' `experts_implementation`; "" for a model without experts.
      compiled: whether transformers' model goes through `torch.compile`.
    """

    side: str
    step: str
    config: dict[str, Any]
    experts: str = ""
    compiled: bool = False


class Subject(Protocol):
    """A step that can be taken again and again. `step` may return before its work is done; `wait` when it is."""

    def build(self) -> dict[str, Any]:
        """Makes weights, compiles, and takes a step.

        Returns:
          "platform" ("cpu" where steps are computed on the host), "tokens" of a step, "compile_seconds" (of
          transformers' the time of the first step); of this program's also "device", "devices", "flops", "limit_of"
          and, where a step is bound by memory, the "bytes" that it must read.
        """

    def step(self) -> None:
        """Takes a step; of decoding, a step is a whole generation."""

    def wait(self) -> None:
        """Waits for the steps that were taken."""

    def token(self) -> float:
        """Seconds in which one token is decoded for every row; of decoding alone."""

    def limit(self) -> float:
        """What this machine can do: FLOP/s of a large matmul or, of decoding, bytes/s read. Of this program alone."""

    def device_memory(self) -> int | None:
        """Peak bytes in use on a device; None where the device is the host."""
