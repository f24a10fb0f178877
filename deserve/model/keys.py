"""Typed access to JSON objects such as `config.json`."""

import math
from collections.abc import Container, Sequence
from typing import Any

from deserve.errors import UserError, as_json


class Keys:
    """Typed access to a JSON object. Every getter raises UserError naming the source and the key."""

    def __init__(self, raw: dict[str, Any], source: str, prefix: str = ""):
        self.raw, self.source, self.prefix = raw, source, prefix

    def fail(self, key: str, what: str) -> UserError:
        return UserError(f"{self.source}: {self.prefix}{key} {what}")

    def _get(self, key: str, kinds: tuple[type, ...], noun: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        # bool is an int to Python, but no count or factor to anybody
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.fail(key, f"must be {noun}, not {as_json(value)}")
        return value

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value: int = self._get(key, (int,), "a whole number", default)
        if value < least:
            raise self.fail(key, f"must be at least {least}, not {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._get(key, (int, float), "a number", default))
        if not (value > 0 and math.isfinite(value)):
            raise self.fail(key, f"must be a positive number, not {value}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self._get(key, (bool,), "true or false", default))

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, (str,), "a string", default))

    def within(self, key: str) -> "Keys":
        """The object at `key`, which may be missing or null."""
        value = self._get(key, (dict,), "an object", {})
        return Keys(value, self.source, f"{self.prefix}{key}.")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings, which may be missing or null."""
        value = self._get(key, (list,), "a list of strings", [])
        if not all(isinstance(item, str) for item in value):
            raise self.fail(key, f"must be a list of strings, not {as_json(value)}")
        return tuple(value)

    def indices(self, key: str, count: int) -> set[int]:
        """A list of numbers below `count`, which may be missing or null."""
        value = self._get(key, (list,), "a list of whole numbers", [])
        if not all(type(item) is int and 0 <= item < count for item in value):
            raise self.fail(key, f"must be a list of whole numbers from 0 to {count - 1}, not {as_json(value)}")
        return set(value)

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of `count` positive numbers."""
        value = self._get(key, (list,), "a list of numbers", None)
        if len(value) != count or not all(type(item) in (int, float) and 0 < item < math.inf for item in value):
            raise self.fail(key, f"must be {count} positive numbers, not {as_json(value)}")
        return [float(item) for item in value]

    def sizes(self, key: str) -> tuple[int, int] | None:
        """Two counts, which may be missing or null."""
        value = self.raw.get(key)
        if value is None:
            return None
        if not (isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)):
            raise self.fail(key, f"must be two whole numbers, not {as_json(value)}")
        return value[0], value[1]

    def one_of(self, key: str, allowed: Sequence[Any], default: Any = None) -> Any:
        """One of the values `allowed`; missing and null are `default`, or refused without one."""
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.fail(key, "is missing")
        if value not in allowed or type(value) not in {type(item) for item in allowed}:
            supported = ", ".join(str(item) for item in allowed)
            raise self.fail(key, f"{as_json(value)} is not supported; supported: {supported}")
        return value

    def refuse_others(self, known: Container[str]) -> None:
        """Raise UserError for a key that is not `known`, unless its value says nothing (null, false, empty)."""
        for key, value in self.raw.items():
            if key not in known and value:
                raise self.fail(key, f"({as_json(value)}) is not supported")
