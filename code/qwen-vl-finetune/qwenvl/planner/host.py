"""The host memory that is available here: that of the machine, or less in a container or job with a limit (cgroups)."""

from pathlib import Path

import psutil

FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, usage and the field of memory.stat with file pages that can be dropped: cgroups version 2 and 1."""


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that a process started here can use."""
    return min([psutil.virtual_memory().available, *limits(root)])


def limits(root: Path = Path("/")) -> list[float]:
    """Bytes that each memory limit of this process leaves: those of its cgroup and of all above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # In a container, the path may be the host's while the container's own cgroup is mounted at the top.
        below = top / path.lstrip("/")
        for folder in dict.fromkeys([below, *below.parents]):
            if folder == top or top in folder.parents:
                found += [left for names in FILES if (left := _left(folder, *names)) is not None]
    return found


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> float | None:
    """Bytes below the limit of a cgroup; None where it has no such limit."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" means unlimited
        return None
    return max(0.0, most - used + int(fields.get(reclaimable, 0)))
