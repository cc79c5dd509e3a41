"""The text of a C header and of what it includes: comments removed, definitions found. Nothing is evaluated here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import VdpaBridgeError

__all__ = ["Block", "Source", "read_source"]

#: Headers that define types and macros that are known here.
_KNOWN = frozenset(
    {"types.h", "ioctl.h", "compiler.h", "compiler_types.h", "stddef.h", "posix_types.h", "const.h", "limits.h"}
)
_INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([\w/.+-]+)[>\"]", re.MULTILINE)
_DEFINE = re.compile(r"^\s*#\s*define\s+(\w+)(\([^)]*\))?[ \t]*(.*)$", re.MULTILINE)
_BLOCK = re.compile(r"\b(struct|union|enum)\s+(\w+)\s*\{|\btypedef\s+([^;{}]+);")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A definition with braces."""

    kind: str
    """struct, union, enum or typedef."""
    name: str
    body: str
    """What is between the braces, or behind the word typedef."""
    packed: bool


@dataclass(slots=True)
class Source:
    """What headers define, in its order."""

    macros: dict[str, str] = field(default_factory=dict)
    """Macros without arguments -> their text."""
    blocks: list[Block] = field(default_factory=list)


def read_source(path: Path) -> Source:
    """What the header at ``path`` and those that it includes define; these are looked for beside it.

    All branches of conditions count; of a name that is defined twice, the first definition. Raises `VdpaBridgeError` if
    the file cannot be read.
    """
    source = Source()
    _add(path, source, set())
    return source


def _add(path: Path, source: Source, seen: set[Path]) -> None:
    if path in seen:
        return
    seen.add(path)
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise VdpaBridgeError("read header", device=str(path), why=error.strerror or str(error)) from error
    text = _COMMENT.sub(" ", text).replace("\\\n", " ")
    for name in _INCLUDE.findall(text):
        included = _beside(path, name)
        if included is not None:
            _add(included, source, seen)
    for name, arguments, value in _DEFINE.findall(text):
        if not arguments and value.strip():
            source.macros.setdefault(name, value.strip())
    known = {(block.kind, block.name) for block in source.blocks}
    source.blocks += [block for block in _blocks(text) if (block.kind, block.name) not in known]


def _beside(path: Path, name: str) -> Path | None:
    """The file that ``path`` includes as ``name``, if it is in the same folder or include tree."""
    if Path(name).name in _KNOWN or not name.startswith("linux/"):
        return None
    folder = path.parent
    candidates = (folder / name, folder.parent / name)
    return next((each for each in candidates if each.is_file()), None)


def _blocks(text: str) -> Iterator[Block]:
    without_macros = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    at = 0
    while begin := _BLOCK.search(without_macros, at):
        if begin[3]:
            yield Block("typedef", begin[3].split()[-1], begin[3], packed=False)
            at = begin.end()
            continue
        end = _closing(without_macros, begin.end())
        if end is None:
            return
        tail = without_macros[end + 1 :].partition(";")[0]
        packed = "packed" in tail
        yield Block(begin[1], begin[2], without_macros[begin.end() : end], packed)
        at = end


def _closing(text: str, at: int) -> int | None:
    """Where the brace that was opened before ``at`` is closed."""
    depth = 1
    for match in re.finditer(r"[{}]", text[at:]):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return at + match.start()
    return None
