"""Which regular expressions a run may have: those whose compiled form is small.

The module `regex` writes a repetition with a least count out that many times, nested ones times each other,
and asks the machine for all of that memory at once: a pattern of 28 characters can take gigabytes. So the
parts of the written-out form are counted before anything is compiled. Knows patterns only.
"""

from __future__ import annotations

import regex

MAX_NESTING = 20
MAX_PARTS = 10_000

_TOKENS = regex.compile(
    r"""(?s)
    (?P<verbose> \(\?[a-wyzA-Z01]*+x )
  | (?P<skipped> \(\?\#(?:[^)\\]|\\.)*+\) | \(\?(?!R)[a-zA-Z01-]++\) )  # comments, and flags on their own
  | (?P<open>    \( )
  | (?P<close>   \) )
  | (?P<fuzzy>   \{(?:[deis][<=,:}]|\d++[deis<]) )
  | (?P<count>   \{\d*+ )
  | (?P<class>   \[\^?+\]?+(?:[^\]\\]|\\.)*+\] )
  | (?P<part>    \\. | . )
    """,
    regex.VERBOSE,
)
_NOT_TAKEN = {
    "verbose": "the flag x is not taken; write the pattern without it, and without spaces and comments",
    "fuzzy": r"approximate matching is not taken; write \{ for a brace",
}
"""What would hide groups or counts from the reading below."""


def fault(pattern: str) -> str | None:
    """What is wrong with a pattern: the rule and the fix; None: it can be used."""
    try:
        return _fault_of_size(pattern) or _fault_of_syntax(pattern)
    except (RecursionError, OverflowError, MemoryError):
        return "it is too large to compile; write a shorter one"


def _fault_of_syntax(pattern: str) -> str | None:
    try:
        regex.compile(pattern, regex.VERSION0)
    except (regex.error, ValueError) as error:  # ValueError: flags that exclude each other
        return f"not a regular expression of Python's regex module: {error}; correct it there"
    return None


def _fault_of_size(pattern: str) -> str | None:
    groups = [0]
    """Parts in each open group so far, the whole pattern first."""
    last = 0
    """Parts of the item that a count would repeat."""
    for token in _TOKENS.finditer(pattern):
        kind, text = str(token.lastgroup), token.group()
        if kind in _NOT_TAKEN:
            return _NOT_TAKEN[kind]
        if kind == "class" and "[:" in text[1:]:
            return r"named classes are not taken; write \p{alpha} for [:alpha:]"
        if kind == "open":
            groups.append(0)
            if len(groups) > MAX_NESTING + 1:
                return f"groups may stand inside of each other {MAX_NESTING} deep; nest fewer"
        elif kind == "close" and len(groups) > 1:
            last = max(groups.pop(), 1)
            groups[-1] += last
        elif kind == "count":
            groups[-1] += last * (max(int(text[1:] or 0), 1) - 1)
        elif kind in ("class", "part"):
            last = 1
            groups[-1] += 1
    parts = sum(groups)
    if parts > MAX_PARTS:
        return (
            f"with every counted repetition written out it has {parts} parts, and {MAX_PARTS} are the most; "
            "repeat less often, or use * or +"
        )
    return None
