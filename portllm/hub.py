"""From what the user names (a path, or a hub id) to a local path."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import PortllmError

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def resolve(path: str | os.PathLike[str], *, what: str, allow: tuple[str, ...]) -> Path:
    """A local path for ``path``; a hub id that is no path is downloaded with huggingface_hub.

    Args:
        path: a file or directory, or "owner/name".
        what: "patch" or "model", for messages.
        allow: file patterns to download.

    Raises:
        PortllmError: neither a path nor a hub id that can be had.
    """
    local = Path(path)
    if os.path.exists(local):  # False, where Path.exists raises, for a name that no file can have
        return local
    text = os.fspath(path)
    if not _HUB_ID.match(text) or text.startswith("."):
        raise PortllmError(f"{text}: no such {what}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise PortllmError(f"{text}: no such {what} (and huggingface_hub is not installed to look for it)") from None
    try:
        return Path(snapshot_download(text, allow_patterns=list(allow)))
    except Exception as error:  # network, authentication and name errors are of many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PortllmError(f"{text}: no such {what} here, and not to be had from the hub: {reason}") from None
