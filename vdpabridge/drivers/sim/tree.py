"""The files that the simulated virtio-fs device shares: read-only, in memory, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Directory", "File", "Node", "default_tree", "find"]


@dataclass(frozen=True, slots=True)
class File:
    """A regular file."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory; its entries are listed in this order."""

    entries: dict[str, File | Directory] = field(default_factory=dict)


Node = File | Directory
_LINES = 2000


def default_tree(file_count: int = 10) -> Directory:
    """``README``, ``lines`` (numbered lines, to be read for long) and ``many/`` with ``file_count`` small files."""
    many = {f"{number:05}": File(f"this is file {number}\n".encode()) for number in range(file_count)}
    lines = "".join(f"line {number:05} of the file called lines\n" for number in range(_LINES))
    readme = b"These files exist in the memory of a vdpabridge process only.\n"
    return Directory({"README": File(readme), "lines": File(lines.encode()), "many": Directory(dict(many))})


def find(root: Directory, path: str) -> Node | None:
    """What is at ``path`` below ``root`` (``"many/00001"``; ``""`` is the root itself); None where nothing is."""
    node: Node | None = root
    for name in filter(None, path.split("/")):
        node = node.entries.get(name) if isinstance(node, Directory) else None
    return node
