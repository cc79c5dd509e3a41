"""The files that the simulated virtio-fs device shares, read-only: in memory, the same in every process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Directory", "File", "MemoryDirectory", "MemoryFile", "Node", "default_tree", "find"]


class File(ABC):
    """A regular file."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """How long it is now."""

    @abstractmethod
    def read(self, offset: int, size_bytes: int) -> bytes:
        """Up to ``size_bytes`` from ``offset``."""


class Directory(ABC):
    """A directory; its entries are in the order of `listing`."""

    @abstractmethod
    def listing(self) -> Iterable[tuple[str, bool]]:
        """(name, whether it is a directory) of what is in it. Raises OSError if that cannot be read."""

    @abstractmethod
    def entry(self, name: str) -> Node | None:
        """What is called ``name``; None if nothing is."""

    def close(self) -> None:
        """Let go of what the tree holds, whose root this is. Idempotent."""
        return


@dataclass(frozen=True, slots=True)
class MemoryFile(File):
    """A file in memory."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, size_bytes: int) -> bytes:
        return self.data[offset : offset + size_bytes]


@dataclass(frozen=True, slots=True)
class MemoryDirectory(Directory):
    """A directory in memory."""

    entries: dict[str, Node] = field(default_factory=dict)

    def listing(self) -> Iterable[tuple[str, bool]]:
        return [(name, isinstance(node, Directory)) for name, node in self.entries.items()]

    def entry(self, name: str) -> Node | None:
        return self.entries.get(name)


Node = File | Directory
_LINES = 2000


def default_tree(file_count: int = 10) -> Directory:
    """``README``, ``lines`` (numbered lines, to be read for long) and ``many/`` with ``file_count`` small files."""
    many: dict[str, Node] = {
        f"{number:05}": MemoryFile(f"this is file {number}\n".encode()) for number in range(file_count)
    }
    lines = "".join(f"line {number:05} of the file called lines\n" for number in range(_LINES))
    readme = b"These files exist in the memory of a simulated device only.\n"
    return MemoryDirectory(
        {"README": MemoryFile(readme), "lines": MemoryFile(lines.encode()), "many": MemoryDirectory(many)}
    )


def find(root: Directory, path: str) -> Node | None:
    """What is at ``path`` below ``root`` (``"many/00001"``; ``""`` is the root itself); None if nothing is there."""
    node: Node | None = root
    for name in filter(None, path.split("/")):
        node = node.entry(name) if isinstance(node, Directory) else None
    return node
