"""Checks of single JSON values. All raise RequestError, naming what was wrong with what."""

from typing import Any

from deserve.errors import RequestError


def brief(value: Any) -> str:
    """A JSON value for an error message: short whatever it holds."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:60] + "..."


def checked_text(value: Any, name: str) -> str:
    """`value` if it is a string that UTF-8 can hold, which a lone surrogate in a JSON escape is not."""
    if not isinstance(value, str):
        raise RequestError("invalid_value", f"{name} is {brief(value)}, but must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError("invalid_value", f"{name} holds a lone surrogate, which is no character") from None
    return value


def checked_whole(value: Any, name: str, low: int, high: int | None = None) -> int:
    """`value` if it is a whole number of at least `low` and at most `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError("invalid_value", f"{name} is {brief(value)}, but must be a whole number {bounds}")
    return value


def checked_number(value: Any, name: str, low: float, high: float, bounds: str) -> float:
    """`value` if it is a number from `low` to `high`, which `bounds` says in words."""
    # Comparing, unlike converting, takes integers of any size; NaN fails it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError("invalid_value", f"{name} is {brief(value)}, but must be {bounds}")
    return float(value)


def checked_flag(value: Any, name: str) -> bool:
    """`value` if it is true or false."""
    if not isinstance(value, bool):
        raise RequestError("invalid_value", f"{name} is {brief(value)}, but must be true or false")
    return value
