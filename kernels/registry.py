"""Find the back ends of a family by its folder: adding a folder is all it takes to add a family."""

import importlib
import pkgutil
from typing import Any


def families(package: str) -> tuple[str, ...]:
    """The names of the folders under `package` ("kernels.linear"), sorted."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(path) if module.ispkg))


def discover(package: str, family: str) -> tuple[Any, ...]:
    """The KERNELS of one family, fastest first, the reference last. Raises ValueError with the names that exist."""
    known = families(package)
    if family not in known:
        raise ValueError(f"{package} has no family {family!r}; it has {', '.join(known)}")
    kernels: tuple[Any, ...] = importlib.import_module(f"{package}.{family}").KERNELS
    return kernels
