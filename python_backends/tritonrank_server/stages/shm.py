"""The names of what the stages share in memory, by which whoever ends a server finds them."""

from __future__ import annotations

import socket


def stages_prefix(pid: int) -> str:
    """What the names of the regions begin with that the stages of a ``tritonserver`` make."""
    return f"tritonrank-{socket.gethostname()}-{pid}-"
