"""Every Python process that tests start runs this first: JAX processes of all ranks keep what they compile.

JAX lets rank 0 alone write to the compilation cache and the others read its entries. On CPU these never match: each
process's key has a fingerprint of its own. So of two workers one would compile anew in every incarnation, 15 s of CPU.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

NAME = "jax._src.compiler"


class Finder(importlib.abc.MetaPathFinder):
    """Lets the module be found as it is, and changed once it is loaded."""

    def find_spec(self, fullname, path, target=None):
        if fullname != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            module._cache_write = as_rank_0(module, module._cache_write)

        spec.loader.exec_module = load_and_change
        return spec


def as_rank_0(module: ModuleType, write):
    def write_anyway(*arguments):
        state = module.distributed.global_state
        rank, state.process_id = state.process_id, 0
        try:
            write(*arguments)
        finally:
            state.process_id = rank

    return write_anyway


sys.meta_path.insert(0, Finder())
