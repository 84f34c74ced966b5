"""Replaces Ray's `setup_external_storage` for configs of the type "valkey".

Checks first that Ray's internals are those that this package knows: a mismatch that goes unnoticed
shows much later, as a job that hangs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from ray_valkey_spill import __version__
from ray_valkey_spill._startup import RAY_FUNCTION, RAY_MODULE
from ray_valkey_spill.config import check_params, json_kind
from ray_valkey_spill.errors import ConfigError, IncompatibleRayError

__all__ = ["params_of", "require_compatible", "set_up"]

_PARAMETERS = ["config", "node_id", "session_name"]
_METHODS = ["_get_objects_from_store", "_put_object_to_store"]
_GLOBAL = "_external_storage"


def set_up(
    module: ModuleType, original: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """Make the storage, and store it where Ray's own function does.

    Raises:
        IncompatibleRayError: Ray's internals have changed shape.
        ConfigError, ServerError: as `ValkeyStorage`.
    """
    require_compatible(module, original)
    assert original is not None
    arguments = inspect.signature(original).bind(*args, **kwargs).arguments
    params = params_of(arguments["config"])
    check_params(params)  # or a parameter "node_id" would collide with Ray's argument first

    from ray_valkey_spill.plugin.storage import ValkeyStorage

    storage = ValkeyStorage(arguments["node_id"], arguments["session_name"], **params)
    setattr(module, _GLOBAL, storage)
    return storage


def params_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters in a spilling config, unchecked.

    Raises:
        ConfigError: the config has another shape.
    """
    params = {} if config.get("params") is None else config["params"]
    if not isinstance(params, Mapping):
        # The value itself may be a url with a password.
        raise ConfigError(f"params must be a JSON object, not {json_kind(params)}")
    unknown = set(config) - {"type", "params"}
    if unknown:
        raise ConfigError(
            f"the spilling config has {min(unknown)!r} beside 'type' and 'params': "
            "parameters belong inside 'params'"
        )
    return params


def require_compatible(module: ModuleType, original: Callable[..., Any] | None) -> None:
    """Raise IncompatibleRayError unless Ray's module has the functions that this package needs."""
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
            "(2.35 or newer)"
        )
