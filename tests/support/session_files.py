"""The files that the processes of a session share."""

from __future__ import annotations

from pathlib import Path

from ray_valkey_spill.plugin.shared_files import NAME


def shared_files(session: Path) -> Path:
    """Return their directory in that of a session, which is created if it is missing."""
    directory = session / NAME
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory
