"""What pydantic found wrong with a body, in words that need no knowledge of pydantic."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

WORDS = {
    "missing": "this field is required",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_short": "must have at least {min_length} item, found {actual_length}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "greater_than_equal": "must be at least {ge}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
}


def complaint(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors, without the field it is about."""
    words = WORDS.get(error["type"])
    if words is not None:
        return words.format_map(error.get("ctx", {}))
    return str(error["msg"]).removeprefix("Value error, ")


def no_such_field(model: type[BaseModel] | None, loc: Sequence[int | str]) -> str:
    """Of a field that the body has no place for, and the one that was probably meant. model: of the whole body."""
    *outer, name = loc
    for part in outer:
        field = None if model is None or isinstance(part, int) else model.model_fields.get(part)
        model = model if isinstance(part, int) else None if field is None else _model_in(field.annotation)
    matches = [] if model is None else get_close_matches(str(name), model.model_fields, n=1)
    return "there is no such field here" + (f"; did you mean {matches[0]}?" if matches else "")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """list[Message] | None -> Message."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
