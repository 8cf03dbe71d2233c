"""What bitsandbytes asks the hub for as it is imported, on CPUs with AVX512-BF16; transformers and peft import it where it is
installed. That is code from the network which nobody agreed to run, for products that have no backward: it is not asked for."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

_ASKS = "bitsandbytes.backends.cpu.ops"
_HUB = "kernels"  #: the package that downloads


class _WithoutHub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets one module run as on a machine without the package that downloads, and without what it then says."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _ASKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Its advice is to install that package. The fallback that it then takes is what is wanted here.
        logging.getLogger(_ASKS).addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
        loaded = {name: sys.modules.pop(name) for name in (_HUB,) if name in sys.modules}
        sys.modules[_HUB] = None  # type: ignore[assignment] # an import of it raises
        try:
            self._loader.exec_module(module)
        finally:
            del sys.modules[_HUB]
            sys.modules.update(loaded)


def ask_for_none() -> None:
    """Before transformers is imported; bitsandbytes itself is left to whoever needs it."""
    sys.meta_path.insert(0, _WithoutHub())
