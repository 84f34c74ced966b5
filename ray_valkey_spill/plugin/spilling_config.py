"""Makes the values that Ray's configuration takes."""

from __future__ import annotations

import json
from typing import Any

from ray_valkey_spill._startup import STORAGE_TYPE
from ray_valkey_spill.config import check_params
from ray_valkey_spill.errors import ConfigError

__all__ = ["RAY_SETTINGS", "spilling_config", "system_config"]

# Ray settings that spilling to Valkey needs, as a system config takes them.
# While the file system of its temporary directory is 95 % full, Ray raises OutOfDiskError instead
# of creating objects that need spilling, whatever the storage: plasma's fallback files are there
# (`PlasmaStoreRunner::Start`). 1 switches this check off (`FileSystemMonitor`, Ray 2.60).
RAY_SETTINGS: dict[str, int] = {"local_fs_capacity_threshold": 1}


def spilling_config(url: str | None = None, **params: Any) -> str:
    """Check the parameters, and return the JSON for Ray's `object_spilling_config`.

    The result depends on the arguments alone. The environment in which Ray starts may add
    parameters, which are checked there.

    Args:
        url: the server; without it each node uses `RAY_VALKEY_SPILL_URL`, or the default.
        **params: any other parameter. Sizes are bytes, or text with a unit such as "400MiB".

    Raises:
        ConfigError: Ray would not start with it in any environment.
    """
    given = {"url": url, **params}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        check_params(given)
    except ConfigError as error:
        # Its message names the fix; frames in this package would only hide it.
        raise error.with_traceback(None) from None
    return json.dumps({"type": STORAGE_TYPE, "params": given})


def system_config(url: str | None = None, **params: Any) -> dict[str, str | int]:
    """Return the value for `ray.init(_system_config=…)`; takes and raises as `spilling_config`.

    Beside the spilling config it contains `RAY_SETTINGS`, which switch off Ray's check that the
    local disk is not nearly full. To keep that check, override it:
    `{**system_config(…), "local_fs_capacity_threshold": 0.95}`.
    """
    try:
        config = spilling_config(url, **params)
    except ConfigError as error:
        raise error.with_traceback(None) from None
    return {"object_spilling_config": config, **RAY_SETTINGS}
