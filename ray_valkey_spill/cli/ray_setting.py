"""The environment variables that choose the storage of Ray's head.

Ray 2.60 takes the first that is set of `--object-spilling-directory`,
`RAY_object_spilling_directory`, `--system-config` and `RAY_object_spilling_config`
(`Node._get_object_spilling_config` in `ray/_private/node.py`). Commands can see the variables only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ray_valkey_spill._startup import STORAGE_TYPE
from ray_valkey_spill.config import json_kind, json_text
from ray_valkey_spill.errors import ConfigError, SpillError
from ray_valkey_spill.plugin.registration import params_of

__all__ = ["CONFIG_VARIABLE", "describe", "params_from_environment"]

CONFIG_VARIABLE = "RAY_object_spilling_config"
_DIRECTORY_VARIABLE = "RAY_object_spilling_directory"
_COPY = "Copy it from what `ray-valkey-spill config` prints"


def params_from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the parameters in `RAY_object_spilling_config`; none if it is not set.

    Raises:
        ConfigError: Ray would refuse it, or it is for another storage.
    """
    text = environ.get(CONFIG_VARIABLE)
    if not text:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        # Without the text, which may hold a password.
        reason = f"{error.msg} at character {error.pos + 1}"
        raise ConfigError(f"{CONFIG_VARIABLE} is not JSON: {reason}", _COPY) from None
    except (ValueError, RecursionError):
        raise ConfigError(
            f"{CONFIG_VARIABLE} cannot be parsed: it has a number of very many digits, or is "
            "nested too deeply",
            _COPY,
        ) from None
    if isinstance(config, str):
        raise ConfigError(
            f"{CONFIG_VARIABLE} is a JSON string: it was encoded twice",
            "Set it to the JSON object itself, without the quotes around it and the backslashes",
        )
    if not isinstance(config, dict):
        raise ConfigError(
            f"{CONFIG_VARIABLE} must be a JSON object, not {json_kind(config)}", _COPY
        )
    if "object_spilling_config" in config:
        raise ConfigError(
            f"{CONFIG_VARIABLE} has a whole system config",
            "Set it to the value of object_spilling_config alone",
        )
    kind = config.get("type")
    if kind != STORAGE_TYPE:
        has = "has no type" if kind is None else f"has the type {json_text(kind)}"
        raise ConfigError(
            f"{CONFIG_VARIABLE} {has}, so Ray does not spill to Valkey",
            f'Set its type to "{STORAGE_TYPE}". To look at a server in spite of it, give --url',
        )
    try:
        return dict(params_of(config))
    except ConfigError as error:
        raise ConfigError(f"{CONFIG_VARIABLE}: {error.message}", error.hint) from None


def describe(environ: Mapping[str, str]) -> str:
    """Describe the storage of a head that starts with this environment.

    Raises:
        SpillError: it would not spill to Valkey, or not start.
    """
    if directory := environ.get(_DIRECTORY_VARIABLE):
        raise SpillError(
            f"Ray would spill to the directory {directory}: {_DIRECTORY_VARIABLE} is set, and "
            f"overrides --system-config and {CONFIG_VARIABLE}",
            f"Unset {_DIRECTORY_VARIABLE}",
        )
    if not environ.get(CONFIG_VARIABLE):
        return (
            f"{CONFIG_VARIABLE} is not set: a head spills to Valkey if its --system-config says "
            "so, and to its disk if not"
        )
    params_from_environment(environ)
    return f"a head uses {CONFIG_VARIABLE}, unless its --system-config has another"
