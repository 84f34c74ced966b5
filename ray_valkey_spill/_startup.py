"""Adds the storage type "valkey" to Ray, in every interpreter of the environment.

Ray has no plug-in point for a storage class: `setup_external_storage` of
`ray._private.external_storage` is a closed if/elif over the config's type, and the processes that
spill call it before they run any user code. So this module extends that function when Ray's module
is imported.

Up to Python 3.14, `ray_valkey_spill.pth` puts a finder on `sys.meta_path` when an interpreter
starts. It imports nothing, since most interpreters never import Ray; the finder calls `find_spec`
here. From Python 3.15 on, `ray_valkey_spill.start` replaces it (PEP 829) and calls `install`. Both
have the same effect, and repeating either has no further effect.

`RAY_VALKEY_SPILL_DISABLE=1` in the environment switches it off. Standard library only.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

RAY_MODULE = "ray._private.external_storage"
RAY_FUNCTION = "setup_external_storage"
STORAGE_TYPE = "valkey"


class RayValkeySpillFinder:
    """The finder that `ray_valkey_spill.pth` defines too, under exactly this name."""

    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        return find_spec(name, path, target) if name == RAY_MODULE else None


def install() -> None:
    """Add the type to Ray, now or once its module is imported."""
    module = sys.modules.get(RAY_MODULE)
    if module is not None:
        if not is_disabled():
            _extend(module)
    elif not is_installed():
        sys.meta_path.insert(0, RayValkeySpillFinder)


def is_installed() -> bool:
    """Whether Ray knows the type in this interpreter, or will once its module is imported.

    Does not consider `is_disabled`.
    """
    module = sys.modules.get(RAY_MODULE)
    if module is not None:
        return hasattr(getattr(module, RAY_FUNCTION, None), "ray_valkey_spill_original")
    return any(
        getattr(finder, "__name__", "") == RayValkeySpillFinder.__name__ for finder in sys.meta_path
    )


def is_disabled() -> bool:
    return os.environ.get("RAY_VALKEY_SPILL_DISABLE", "").lower() in ("1", "true", "yes")


def find_spec(
    name: str, path: "Sequence[str] | None", target: "ModuleType | None"
) -> "ModuleSpec | None":
    """Find Ray's module by the other finders, and extend it right after it has run."""
    if is_disabled():
        return None
    spec = None
    for finder in sys.meta_path:
        ours = getattr(finder, "__name__", "") == RayValkeySpillFinder.__name__
        if not ours and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, path, target)
        if spec is not None:
            break
    if spec is None or spec.loader is None:
        return None
    exec_module = spec.loader.exec_module

    def exec_and_extend(module: "ModuleType") -> None:
        exec_module(module)
        _extend(module)

    spec.loader.exec_module = exec_and_extend  # type: ignore[method-assign]
    return spec


def _extend(module: "ModuleType") -> None:
    """Make the module's function return a ValkeyStorage where the config asks for one."""
    original = getattr(module, RAY_FUNCTION, None)
    if hasattr(original, "ray_valkey_spill_original"):
        return

    def setup_external_storage(*args: "Any", **kwargs: "Any") -> "Any":
        config = args[0] if args else kwargs.get("config")
        if isinstance(config, dict) and config.get("type") == STORAGE_TYPE:
            from ray_valkey_spill.errors import SpillError
            from ray_valkey_spill.plugin.registration import set_up

            try:
                return set_up(module, original, *args, **kwargs)
            except SpillError as error:
                # Its message names the fix; its frames in this package would only hide it.
                raise error.with_traceback(None) from None
        if original is None:
            raise AttributeError(f"module {RAY_MODULE!r} has no attribute {RAY_FUNCTION!r}")
        return original(*args, **kwargs)

    setup_external_storage.__doc__ = getattr(original, "__doc__", None)
    setup_external_storage.ray_valkey_spill_original = original  # type: ignore[attr-defined]
    setattr(module, RAY_FUNCTION, setup_external_storage)
