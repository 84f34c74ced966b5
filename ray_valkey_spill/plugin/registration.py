"""Stands in for Ray's `setup_external_storage` where the config's type is "valkey".

Checks first that Ray's internals are what this package knows, since a silent mismatch would show
much later, as a job that hangs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ray_valkey_spill import __version__
from ray_valkey_spill._startup import RAY_FUNCTION, RAY_MODULE
from ray_valkey_spill.config import check_params
from ray_valkey_spill.errors import ConfigError, IncompatibleRayError

__all__ = ["require_compatible", "set_up"]

_PARAMETERS = ["config", "node_id", "session_name"]
_METHODS = ["_get_objects_from_store", "_put_object_to_store"]
_GLOBAL = "_external_storage"


def set_up(
    module: ModuleType, original: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """What Ray calls: make the storage, and leave it where Ray's own function leaves its own.

    Raises:
        IncompatibleRayError: if Ray's internals have changed shape.
        ConfigError, ServerError: as `ValkeyStorage`.
    """
    require_compatible(module, original)
    assert original is not None
    arguments = inspect.signature(original).bind(*args, **kwargs).arguments
    config = arguments["config"]
    params = {} if config.get("params") is None else config["params"]
    if not isinstance(params, Mapping):
        # Its value is not shown: it may be a url with a password.
        raise ConfigError(f"params must be a JSON object, not {type(params).__name__}")
    unknown = set(config) - {"type", "params"}
    if unknown:
        raise ConfigError(
            f"the spilling config has {min(unknown)!r} beside 'type' and 'params': "
            "parameters belong inside 'params'"
        )
    check_params(params)  # or a parameter "node_id" would meet Ray's argument first

    from ray_valkey_spill.plugin.storage import ValkeyStorage

    storage = ValkeyStorage(arguments["node_id"], arguments["session_name"], **params)
    setattr(module, _GLOBAL, storage)
    return storage


def require_compatible(module: ModuleType, original: Callable[..., Any] | None) -> None:
    """Raise IncompatibleRayError unless Ray's module has what this package plugs into."""
    missing = []
    if original is None:
        missing.append(f"{RAY_FUNCTION}()")
    elif list(inspect.signature(original).parameters) != _PARAMETERS:
        missing.append(f"{RAY_FUNCTION}({', '.join(_PARAMETERS)})")
    base = getattr(module, "ExternalStorage", None)
    missing += [f"ExternalStorage.{method}()" for method in _METHODS if not hasattr(base, method)]
    if not hasattr(module, _GLOBAL):
        missing.append(_GLOBAL)
    if missing:
        ray_version = getattr(sys.modules.get("ray"), "__version__", "of unknown version")
        raise IncompatibleRayError(
            f"ray-valkey-spill {__version__} does not fit Ray {ray_version}: {RAY_MODULE} has "
            f"no {', no '.join(missing)}. Upgrade ray-valkey-spill, or install a Ray it supports "
            "(2.50 or newer)"
        )
