"""The real SGLang wheel in a process without a GPU: what it cannot import here is stood in for, nothing of HiCache is.

Stood in for, where they are not installed: torchvision and gguf (pictures and a weight format), and the contents of
`sglang.srt.configs` (descriptions of models, which need both). SGLang's CUDA kernels are loaded only when used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STOOD_IN_FOR = ("torchvision", "gguf")
CONFIGS = "sglang.srt.configs"


class _AnyClass(type):
    """A class with any attribute; called with one function alone, it returns it, as a decorator does."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {})

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if len(arguments) == 1 and callable(arguments[0]) and not named:
            return arguments[0]
        return super().__call__()


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last of all finders, so that what is installed is used."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in STOOD_IN_FOR:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def why_not() -> str:
    """Why the real SGLang can't be imported here; empty if it can."""
    for name in ("sglang", "torch", "orjson", "IPython", "requests", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed here: see `make test-engines`"
    return ""


def prepare() -> None:
    """Makes SGLang's host pools and cache controller importable. Idempotent."""
    if CONFIGS in sys.modules:
        return
    import transformers

    # Once without the stand-ins: transformers looks for torchvision's version where it finds one.
    _ = transformers.AutoProcessor, transformers.AutoImageProcessor
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    configs = _StandIn(CONFIGS)
    configs.__path__ = [str(Path(found.submodule_search_locations[0]) / "srt" / "configs")]
    sys.modules[CONFIGS] = configs
    sys.meta_path.append(_Finder())
