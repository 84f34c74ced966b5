"""Ray object spilling to Valkey.

Once installed, `{"type": "valkey", "params": {"url": "valkey://host:6379/0"}}` is a valid
`object_spilling_config` for Ray; nothing has to be imported. See the README.

For others to import are what is named here and the errors of `ray_valkey_spill.errors`; all other
modules are the package's own, and may change with every version.
"""

# From Python 3.15 on every interpreter of the environment imports this module at start-up (see
# `_startup`), so it loads nothing, not even typing: what it exports is imported when asked for.

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ray_valkey_spill.plugin.spilling_config import spilling_config, system_config
    from ray_valkey_spill.plugin.storage import ValkeyStorage

__all__ = ["ValkeyStorage", "__version__", "spilling_config", "system_config"]

__version__ = "0.2.0"

_HOME = {
    "ValkeyStorage": "ray_valkey_spill.plugin.storage",
    "spilling_config": "ray_valkey_spill.plugin.spilling_config",
    "system_config": "ray_valkey_spill.plugin.spilling_config",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
