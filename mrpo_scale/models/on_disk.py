"""A tensor of a model as a checkpoint has it: as it is in a file, or made of others: experts stacked, matrices joined or split.

transformers' converters run here one tensor of the model at a time, so nothing else has to be in memory meanwhile. Where row i is
made of the i-th tensors alone, as in stacked experts, a rank that keeps some rows reads their tensors and no others. Everything
else is made whole and then cut: a converter that is given a part of its tensors may make another tensor, and say nothing.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from mrpo_scale.base.errors import ConfigError, one_line

_LOW_PRECISION = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


@dataclass(frozen=True)
class OnDisk:
    """A tensor of a safetensors file, which stays open as long as this lives."""

    file: Path
    key: str
    piece: Any  #: safetensors' slice

    @property
    def parts(self) -> list[OnDisk]:
        return [self]

    @property
    def shape(self) -> list[int]:
        return self.piece.get_shape()

    @property
    def dtype(self) -> torch.dtype:
        return self.piece[:0].dtype if self.shape else self.read().dtype

    def read(self, rows: slice | None = None) -> Tensor:
        """All of it or some rows: a view of the mapped file."""
        return self.piece[...] if rows is None else self.piece[rows]


def targets_of(converter: WeightConverter, first: str) -> list[str]:
    """Names in the model of what ``converter`` makes, of which the first is ``first``: one, or the parts of what is split."""
    start = converter.target_patterns[0]
    return [first.replace(start, pattern) for pattern in converter.target_patterns]


class Converted:
    """One tensor of the model that ``converter`` makes of ``sources``: {source pattern: tensors on disk, in natural order}.

    Args:
        of: how errors call the model.
        first: name in the model of the first tensor that the converter makes.
        name: of the one that this is.
    """

    def __init__(self, of: str, model: PreTrainedModel, converter: WeightConverter, first: str, name: str) -> None:
        self._of, self._model, self._converter, self._first, self._name = of, model, converter, first, name
        self.sources: dict[str, list[OnDisk]] = defaultdict(list)

    @property
    def parts(self) -> list[OnDisk]:
        """All that is on disk of it."""
        return [part for parts in self.sources.values() for part in parts]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> list[int]:
        """From the headers, but for what is dequantized: that is checked when it is read. Raises as :meth:`read` does."""
        if self._dequantizes:
            return list(self._target.shape)
        return list(self._convert({p: [_on_meta(d) for d in on_disk] for p, on_disk in self.sources.items()}).shape)

    def read(self, rows: slice | None = None) -> Tensor:
        """All of it or some rows, in the dtype that the model has it in.

        Raises:
            ConfigError: the converter cannot make it of what is on disk.
        """
        if rows is None or not self.row_by_row:
            whole = self._convert({pattern: self._read(parts) for pattern, parts in self.sources.items()})
            if whole.shape != self._target.shape:
                raise ConfigError(
                    f"{self._of}: {self._name} is {list(whole.shape)} once dequantized but {list(self._target.shape)} by "
                    "its config.json; the two do not belong together."
                )
            return whole if rows is None else whole[rows]
        return self._convert({pattern: self._read(parts[rows]) for pattern, parts in self.sources.items()})

    def _read(self, parts: list[OnDisk]) -> list[Tensor]:
        if self._dequantizes:
            self._check_scales()
            return [part.read() for part in parts]
        dtype = self._target.dtype
        return [part.read().to(dtype) for part in parts]

    def _check_scales(self) -> None:
        """Raises ConfigError where a weight has lost its scale: transformers takes its numbers for what they stand for."""
        for pattern, parts in self.sources.items():
            scaled = [
                p
                for p, scales in self.sources.items()
                if p.startswith(f"{pattern}_scale") and len(scales) == len(parts)
            ]
            low = [part.key for part in parts if part.dtype in _LOW_PRECISION]
            if pattern.endswith("weight") and low and not scaled:
                raise ConfigError(
                    f"{self._of}: {low[0]} is quantized, and its scales are missing in the checkpoint; get the model again."
                )

    @property
    def _dequantizes(self) -> bool:
        return hasattr(self._converter.operations[0], "hf_quantizer")

    @property
    def _target(self) -> Tensor:
        """The model's, of which only shape and dtype are known."""
        owner, _, leaf = self._name.rpartition(".")
        return getattr(self._model.get_submodule(owner), leaf)

    @property
    def row_by_row(self) -> bool:
        """Whether row i of the result is made of the i-th tensor of each pattern alone."""
        operations = self._converter.operations[1:] if self._dequantizes else self._converter.operations
        stacks = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        along_rows = all(isinstance(operation, Concatenate) and operation.dim != 0 for operation in operations[1:])
        complete = all(len(parts) == self._target.shape[0] for parts in self.sources.values())
        return stacks and along_rows and complete

    def _convert(self, tensors: dict[str, list[Tensor]]) -> Tensor:
        converter: Any = deepcopy(self._converter)
        for pattern in list(tensors):
            for tensor in tensors.pop(pattern):
                converter.add_tensor(self._first, pattern, pattern, tensor)
        try:
            made = converter.convert(self._first, model=self._model, config=self._model.config)[self._name]
        except Exception as error:
            raise ConfigError(
                f"{self._of}: {self._name} cannot be made of {self.parts[0].key} and its like ({type(error).__name__}: "
                f"{one_line(error)[:200]}); get the model again."
            ) from error
        return made[0] if isinstance(made, list) else made


Stored = OnDisk | Converted


def _on_meta(part: OnDisk) -> Tensor:
    return torch.empty(part.shape, device="meta")
