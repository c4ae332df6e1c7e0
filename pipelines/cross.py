"""Cross-attention by our own kernel, in which a prompt's padding is read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

from ..attention.repeats import attend_repeats
from .calls import Call
from .hook import Gates
from .modules import attention_modules
from .row import ModelRow
from .ulysses import Share


class CrossRun:
    """The router of a transformer's attention modules that are not layers of a plan, until `remove`.

    A sparse plan makes self-attention so cheap that attention over 512 rows of text, nearly all of them the same
    padding, becomes the next largest part of a forward.
    """

    def __init__(self, transformer: nn.Module, row: ModelRow, *, backend: str = "auto"):
        self.backend = backend
        modules = cross_modules(transformer, row)
        self._gates = Gates(self, modules)
        self.clear()

    def clear(self) -> None:
        """Begin counting with nothing."""
        self.calls, self.read, self.keys = 0, 0, 0
        self.stock_calls: Counter[str] = Counter()

    def follow(self) -> None:
        """See `Gates.follow`."""
        self._gates.follow()

    def remove(self) -> None:
        """Take the gates off; the counts stay readable."""
        self._gates.remove()

    def dense(self, index: int, query: Tensor, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor | None:
        return None

    def route(self, index: int, call: Call, stock: Callable[[], Tensor], *, token_dim: int) -> Tensor:
        reason = call.beyond_kernels() or ("a mask" if call.mask is not None else "")
        if reason or call.share is not None:
            self.stock_calls[reason or "context parallelism"] += 1
            return stock()
        out, read = attend_repeats(call.query, call.key, call.value, scale=call.scale, backend=self.backend)
        self.calls += 1
        self.read += read
        self.keys += call.key.shape[2]
        return out.transpose(1, 2) if token_dim == 1 else out

    def deal(self, index: int, heads: int, share: Share) -> list[int]:
        return list(range(heads))

    def describe(self) -> str:
        """What became of the calls of the latest run."""
        parts = [f"our kernel, {self.calls} calls, {self.read} of {self.keys} rows read"] if self.calls else []
        parts += [f"stock, {reason} ({count} calls)" for reason, count in self.stock_calls.items()]
        return "; ".join(parts) or "not called yet"


def cross_modules(transformer: nn.Module, row: ModelRow) -> list[nn.Module]:
    """The attention modules of a transformer that no plan counts as layers."""
    modules = attention_modules(transformer)
    layers = set(row.layers(modules))
    return [module for path, module in modules.items() if path not in layers]
