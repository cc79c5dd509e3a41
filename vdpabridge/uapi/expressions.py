"""Evaluates what the kernel's headers have as constants: C's integer expressions, and requests by _IO and the like.

Source: include/uapi/asm-generic/ioctl.h.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..abi.ioc import IOC, IOC_READ, IOC_WRITE

__all__ = ["NotEvaluated", "Request", "evaluate", "request_of"]

_SUFFIX = re.compile(r"\b(0[xX][0-9a-fA-F]+|\d+)([uU]?[lL]{0,2}[uU]?)\b")
_OCTAL = re.compile(r"\b0(\d+)\b")
_CHARACTER = re.compile(r"'([^\\'])'")
_CAST = re.compile(r"\(\s*(?:unsigned\s+|signed\s+)?(?:__[usl]\w+|int|long|char|short|long long)\s*\)")
_REQUEST = re.compile(r"_IO(|R|W|WR)(?:_BAD)?\s*\((.*)\)$", re.DOTALL)
_BITS = frozenset({"BIT", "BIT_ULL", "_BITUL", "_BITULL"})
_BINARY: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.BitXor: operator.xor,
}
#: Without "~": what it gives depends on how wide its operand is, which is not known here.
_UNARY: Mapping[type[ast.unaryop], Callable[[int], int]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_SHIFT_MAX = 128
_DEPTH_MAX = 50
_BYTE = 0xFF
_SIZE_MAX = 0x3FFF
_DIRECTIONS = {"": 0, "R": IOC_READ, "W": IOC_WRITE, "WR": IOC_READ | IOC_WRITE}


class NotEvaluated(Exception):
    """A text that is not a constant, or not one that is understood here."""


@dataclass(frozen=True, slots=True)
class Request:
    """An ioctl as a header defines it."""

    name: str
    number: int
    direction: str
    """As in its macro: "", R (the kernel writes), W (the kernel reads) or WR."""
    type_name: str
    """The C type of its argument; empty if it has none."""
    size_bytes: int


def evaluate(text: str, macros: Mapping[str, str], constants: Mapping[str, int], depth: int = 0) -> int:
    """The value of C expression ``text``. Raises `NotEvaluated`."""
    if depth > _DEPTH_MAX:
        raise NotEvaluated("it is defined by itself")
    translated = _CHARACTER.sub(lambda match: str(ord(match[1])), text)
    translated = _OCTAL.sub(r"0o\1", _SUFFIX.sub(r"\1", _CAST.sub("", translated)))
    try:
        tree = ast.parse(translated.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotEvaluated(f"not an expression: {text[:60]}") from error

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name):
                if name in constants:
                    return constants[name]
                if name in macros:
                    return evaluate(macros[name], macros, constants, depth + 1)
                raise NotEvaluated(f"{name} is not known")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                first, second = value(left), value(right)
                if isinstance(op, (ast.LShift, ast.RShift)) and not 0 <= second < _SHIFT_MAX:
                    raise NotEvaluated(f"a shift by {second}")
                return _BINARY[type(op)](first, second)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](value(operand))
            case ast.Call(func=ast.Name(id=name), args=[argument]) if name in _BITS:
                return 1 << (value(argument) % _SHIFT_MAX)
        raise NotEvaluated(f"not an integer: {text[:60]}")

    return value(tree.body)


def request_of(
    name: str,
    text: str,
    macros: Mapping[str, str],
    constants: Mapping[str, int],
    size_of: Callable[[str], int],
) -> Request | None:
    """The request that a macro with ``text`` defines; None if it defines none. Raises `NotEvaluated`.

    ``size_of`` gives the size of a C type, and raises `NotEvaluated` for one that it does not know.
    """
    match = _REQUEST.match(text)
    if match is None:
        return None
    direction = match[1]
    parts = [part.strip() for part in match[2].split(",", 2)]
    if len(parts) != (2 if not direction else 3):
        raise NotEvaluated(f"not a request: {text[:60]}")
    kind, number = (evaluate(part, macros, constants) for part in parts[:2])
    type_name = " ".join(parts[2].split()) if direction else ""
    size_bytes = size_of(type_name) if type_name else 0
    if not (0 <= kind <= _BYTE and 0 <= number <= _BYTE and size_bytes <= _SIZE_MAX):
        raise NotEvaluated(f"type {kind}, number {number} or {size_bytes} bytes do not fit")
    whole: int = IOC(_DIRECTIONS[direction], kind, number, size_bytes)
    return Request(name, whole, direction, type_name, size_bytes)
