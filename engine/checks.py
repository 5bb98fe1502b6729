"""Values checked where they are written: check(settings) refuses by name what an annotation does not allow.

msgspec looks at types and limits (msgspec.Meta) only when it decodes; this makes constructors as strict as the wire.
"""

import math
from reprlib import Repr

import msgspec
from msgspec import inspect

LONGEST = 80  # characters of a value that an error shows
NAMES = ((inspect.BoolType, "bool"), (inspect.StrType, "str"), (inspect.NoneType, "None"))


def check(settings: msgspec.Struct) -> None:
    """Raise ValueError naming the first field whose value is not what its annotation says, and what that is."""
    for name, annotation in type(settings).__annotations__.items():
        value = getattr(settings, name)
        if not _fits(value, annotation):
            raise ValueError(f"{name} must be {notation(annotation)}; found {_shown(value)}")


def notation(annotation: object) -> str:
    """A type and its limits as one would write them down: "0 <= float <= 1", "int >= 1 | None"."""
    return _notation(inspect.type_info(annotation))


def _fits(value: object, annotation: object) -> bool:
    """NaN is no value of any setting, and infinity one of a bias alone: -inf bans a token."""
    try:
        msgspec.convert(value, annotation)
    except msgspec.ValidationError:
        return False
    if isinstance(value, dict):
        return not any(math.isnan(number) for number in value.values())
    return not isinstance(value, float) or math.isfinite(value)


def _notation(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):  # Meta(title="bytes"), the unit
        return f"{_notation(kind.type)} ({(kind.extra_json_schema or {})['title']})"
    if isinstance(kind, inspect.UnionType):
        return " | ".join(map(_notation, kind.types))
    if isinstance(kind, inspect.LiteralType):
        return " | ".join(map(repr, kind.values))
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return _number(kind)
    if isinstance(kind, inspect.DictType):
        return f"dict[{_notation(kind.key_type)}, {_notation(kind.value_type)}]"
    if isinstance(kind, inspect.VarTupleType):
        return f"tuple[{_notation(kind.item_type)}, ...]"
    return next(name for type_, name in NAMES if isinstance(kind, type_))


def _number(kind: inspect.IntType | inspect.FloatType) -> str:
    """The limit of a machine word is not worth a word."""
    name = "int" if isinstance(kind, inspect.IntType) else "float"
    if kind.ge is None:
        return name
    return f"{name} >= {kind.ge:g}" if kind.le is None or kind.le >= 2**62 else f"{kind.ge:g} <= {name} <= {kind.le:g}"


def _shown(value: object) -> str:
    short = Repr()
    short.maxother = short.maxstring = LONGEST
    return short.repr(value)
