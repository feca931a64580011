"""Watching what the operations of a model receive of its prunable weights.

A zero counts only if the operation that the weight is for receives it. It does not where the model
computes another weight first, as weight standardisation does, or writes to the weight as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adapmtl.components._multiply_adds import factors, multiply_adds
from torch_adapmtl.components._snapshot import storage_of, written_by
from torch_adapmtl.components._trace import Trace, key_of, tensors_in, with_zeros

__all__ = ["WeightUse", "WeightUseMode"]

# Products and look-ups use a weight entry by entry. What they return is no longer the weight, even
# if no input of the model is involved, as where layers transform a table of positions.
_PRODUCTS = frozenset(
    [
        "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr", "matmul",
        "linear", "einsum", "tensordot", "bilinear", "_trilinear", "cdist", "_cdist_forward",
        "embedding", "embedding_bag", "_embedding_bag", "_scaled_mm", "_int_mm", "_fft_r2c",
        "_fft_c2c", "_fft_c2r", "mkldnn_rnn_layer", "_cudnn_rnn",
    ]
)  # fmt: skip
_COPIES = frozenset(["clone", "_to_copy", "lift_fresh_copy"])
_NO_WRITES = frozenset(["detach_", "set_"])  # by their schema they write
# How often a weight is checked that the model computes again at each of many steps.
_CHECKS = 4


@dataclass(frozen=True)
class WeightUse:
    """What a run of a model does with its prunable weights, by their ids.

    Attributes:
        used: Weights whose zeros an operation receives.
        remade: Weights of which an operation receives other values, not zero where the weight is.
        written: Weights that the model writes to.
        replaced: Weights in whose place the model puts other parameters.
        positions: How many multiply-adds each weight of a tensor takes part in, on average over the
            tensor and for one example, if there are any; NaN if that is not known.
    """

    used: frozenset[int] = frozenset()
    remade: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    replaced: frozenset[int] = frozenset()
    positions: Mapping[int, float] = field(default_factory=dict)

    def __or__(self, other: WeightUse) -> WeightUse:
        """Return what two runs do together."""
        return WeightUse(
            self.used | other.used,
            self.remade | other.remade,
            self.written | other.written,
            self.replaced | other.replaced,
            {
                key: self.positions.get(key, 0.0) + other.positions.get(key, 0.0)
                for key in self.positions.keys() | other.positions.keys()
            },
        )


@dataclass(eq=False)
class _Memory:
    """A storage that holds nothing that depends on the inputs of the model.

    Attributes:
        kept: The storage, or a reference that keeps its key from being used again.
        spans: The prunable weights that lie in it, with their first byte and the one after the
            last.
        sources: Ids of the weights that its values are computed from, other than by products.
        traced: Whether its values depend on parameters.
        exact: Whether its values are those of weights.
        dtype: The dtype of the parameters that lie in it.
        seed: A number that other parameters' storages do not have.
    """

    kept: Any
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    sources: frozenset[int] = frozenset()
    traced: bool = False
    exact: bool = False
    dtype: torch.dtype | None = None
    seed: int = 0

    def sources_of(self, tensor: Tensor) -> frozenset[int]:
        """Return the ids of the weights that a tensor in this storage is computed from."""
        if not self.spans:
            return self.sources
        first, last = _extent(tensor)
        lying = (weight for start, end, weight in self.spans if first < end and start < last)
        return self.sources.union(lying)


class WeightUseMode(TorchDispatchMode):
    """Follows the prunable weights of a model through the operations of one run.

    Args:
        model: The model.
        weights: Its prunable weights.
        examples: The number of examples that the run is on.
    """

    def __init__(
        self, model: nn.Module, weights: Iterable[nn.Parameter], examples: int = 1
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._examples = model, examples
        self._weights = {id(weight): weight for weight in weights}
        self._before = {key: weight.detach() for key, weight in self._weights.items()}
        self._known: dict[int, _Memory] = {}  # by the key of the storage
        self._trace = Trace()
        self._checks = dict.fromkeys(self._weights, 0)
        self._used: set[int] = set()
        self._remade: set[int] = set()
        self._remade_beside: set[int] = set()  # perhaps not in place of the weight
        self._written: set[int] = set()
        # Exact fractions, so that the same model has the same positions whatever the batch.
        self._positions = dict.fromkeys(self._weights, Fraction(0))
        self._uncounted: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self._register(tensor)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see `_CopyBeforeWrite`

    def _register(self, tensor: Tensor) -> None:
        if (storage := storage_of(tensor)) is None:
            return
        memory = self._known.setdefault(storage._cdata, _Memory(storage, seed=len(self._known)))
        if isinstance(tensor, nn.Parameter):
            memory.traced, memory.dtype = True, tensor.dtype
        if id(tensor) in self._weights:
            memory.spans.append((*_extent(tensor), id(tensor)))
            memory.exact = True

    def result(self) -> WeightUse:
        """Return what has been seen; call it before the model is restored."""
        for key, weight in self._weights.items():
            before = self._before[key]  # `weight.data = ...` is no operation
            if key_of(weight) != key_of(before) and not torch.equal(weight, before):
                self._written.add(key)
        remade = self._remade | (self._remade_beside - self._used)
        present = {id(parameter) for parameter in self._model.parameters()}
        positions = {
            key: math.nan if key in self._uncounted else float(positions / self._examples)
            for key, positions in self._positions.items()
            if positions or key in self._uncounted
        }
        return WeightUse(
            used=frozenset(self._used),
            remade=frozenset(remade - self._written),
            written=frozenset(self._written),
            replaced=frozenset(self._weights.keys() - present),
            positions=positions,
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if schema is not None:
            self._follow(func, schema.name.partition("::")[2], args, kwargs, out)
        return out

    def _follow(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Note what an operation receives, and what is known of the tensors that it makes."""
        known: list[tuple[Tensor, _Memory]] = []
        data = False
        for tensor in tensors_in((*args, *kwargs.values())):
            if (memory := self._known.get(key_of(tensor))) is not None:
                known.append((tensor, memory))
            elif tensor.numel() and name != "lift_fresh":  # which is in `torch.tensor(...)`
                data = True
        if data and not known:
            return
        product = name in _PRODUCTS or "convolution" in name
        for tensor, memory in known if data or product else ():
            self._receive(tensor, memory, data=data, product=product)
            self._count(func, name, args, out, tensor, memory, product=product)
        written = []
        if func._schema.is_mutable and name not in _NO_WRITES:
            written = [t for t in tensors_in(written_by(func, args, kwargs)) if self._knows(t)]
        for tensor in written:
            if (memory := self._known.get(key_of(tensor))) is None:
                continue  # of a storage that another tensor of the list is in
            memory.exact = False
            if memory.spans:
                self._written |= memory.sources_of(tensor)
            elif data:
                del self._known[key_of(tensor)]
        if data:
            return
        made = [t for t in tensors_in((out,)) if key_of(t) and not self._knows(t)]
        if not (made or written):  # a view
            return
        sources = frozenset[int]()
        if not product:
            sources = sources.union(*(memory.sources_of(tensor) for tensor, memory in known))
        traced = any(memory.traced for _, memory in known)
        exact = name in _COPIES and all(memory.exact for _, memory in known)
        for tensor in made:
            storage = tensor.untyped_storage()
            kept = storage if traced else StorageWeakRef(storage)
            self._known[key_of(tensor)] = _Memory(kept, [], sources, traced, exact)
        for tensor in written:
            memory = self._known[key_of(tensor)]
            if memory.dtype is None:  # a parameter stays a weight of its own, such as an average
                memory.sources |= sources
            memory.traced |= traced
        if traced:
            self._trace.record(func, args, kwargs, out, written)

    def _knows(self, tensor: Tensor) -> bool:
        return key_of(tensor) in self._known

    def _receive(self, tensor: Tensor, memory: _Memory, *, data: bool, product: bool) -> None:
        """Note which weights an operation receives in a tensor, and check that their zeros stay."""
        sources = memory.sources_of(tensor)
        if not sources or not (tensor.is_floating_point() or tensor.is_complex()):
            return
        if memory.exact:
            self._used |= sources
            return
        # Fewer entries than a weight has are a mean or a norm. In a product they may be a part of
        # another weight, or a mean that is used beside the weight.
        reduced = tensor.numel() < min(self._weights[key].numel() for key in sources)
        checked = min(self._checks[key] for key in sources)
        if checked == _CHECKS or (reduced and not product):
            return
        for key in sources:
            self._checks[key] += 1
        if self._trace.keeps_zeros(tensor, self._start):
            self._used |= sources
        elif data and not reduced:
            self._remade |= sources
        else:
            self._remade_beside |= sources

    def _count(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        out: Any,
        tensor: Tensor,
        memory: _Memory,
        *,
        product: bool,
    ) -> None:
        """Add the multiply-adds of an operation to the weights that a factor is computed from."""
        sources = memory.sources_of(tensor)
        if not sources or all(tensor is not factor for factor in tensors_in(factors(name, args))):
            return
        count = multiply_adds(func, args, out, tensor, product=product)
        if count is None:
            self._uncounted |= sources
            return
        each = Fraction(count, sum(self._weights[key].numel() for key in sources))
        for key in sources:
            self._positions[key] += each

    def _start(self, tensor: Tensor, half: int) -> torch.UntypedStorage:
        """Return a copy of the storage of a parameter or a constant for the trace."""
        storage: torch.UntypedStorage = tensor.untyped_storage()
        memory = self._known.get(key_of(tensor))
        if memory is None or memory.dtype is None:
            copied: torch.UntypedStorage = storage.clone()
            return copied
        return with_zeros(storage, memory.dtype, half if memory.spans else None, memory.seed)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage and the one after its last."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (int(reach) + 1) * size
