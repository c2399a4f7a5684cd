"""What pydantic finds wrong with a field, told to its owner: the rule, and the fix. Knows no specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IDENTIFIER = r"^[A-Za-z0-9_-]+$"
NAME = r"^[A-Za-z0-9_-]{1,64}$"
REPOSITORY = r"^[A-Za-z0-9][\w.-]*/[\w.-]+$"
SECRET = r"^[A-Z][A-Z0-9_]{0,63}$"

_FORMS = {
    IDENTIFIER: 'An id has letters, digits, "_", and "-" only; give one as it was handed out',
    NAME: 'A name has 1 to 64 letters, digits, "_", and "-"; give such a name',
    REPOSITORY: 'A repository of the hub is named "owner/name"; give both',
    SECRET: 'A secret is named in capitals, digits, and "_"; give the name, which the operator knows',
}
"""What each pattern says, in words."""

_OBJECT = "Input should be a JSON object; give one in braces"
_ARRAY = "Input should be a JSON array; give one in brackets"
_WHOLE = "{msg}; give a whole number, without quotes"

_TOLD = {
    "bool_type": "{msg}; give true or false",
    "dict_type": _OBJECT,
    "finite_number": "{msg}; give one of the usual numbers",
    "float_type": "{msg}; give a number, without quotes",
    "greater_than": "{msg}; give a number above {gt}",
    "greater_than_equal": "{msg}; give {ge} or more",
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_type": _WHOLE,
    "less_than": "{msg}; give a number below {lt}",
    "less_than_equal": "{msg}; give {le} or less",
    "list_type": _ARRAY,
    "literal_error": "{msg}; give one of these",
    "model_attributes_type": _OBJECT,
    "model_type": _OBJECT,
    "string_pattern_mismatch": "{form}",
    "string_too_long": "{msg}; shorten it",
    "string_too_short": "{msg}; give some text",
    "string_type": "{msg}; give text in quotes",
    "string_unicode": "{msg}; give text that is valid Unicode",
    "too_long": "There should be at most {max_length} in it; give fewer",
    "too_short": "There should be at least {min_length} in it; give more",
    "tuple_type": _ARRAY,
    "union_tag_invalid": "Its {discriminator} should be one of {expected_tags}; give one of these",
    "union_tag_not_found": "Its {discriminator} is missing; name it, for that says what the object is",
}


def rule_and_fix(kind: str, msg: str, context: Mapping[str, Any]) -> str:
    """The sentence for one finding: its type, message, and context as pydantic gives them."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    pattern = context.get("pattern", "")
    form = _FORMS.get(pattern, f"Its form should be {pattern}; give text like that")
    return _TOLD.get(kind, "{msg}; correct it").format(msg=msg, form=form, **values) + "."
