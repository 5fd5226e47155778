"""Typed access to config.json; errors name the file and the key. Knows no families."""

from collections.abc import Mapping
from typing import Any

from shared.errors import ModelError, UnsupportedModel


class Settings:
    """The keys of a config, over what a family assumes for those that are left out."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self.values = values

    def get(self, *keys: str) -> Any:
        """The first of ``keys`` that is set to something."""
        return next((v for v in map(self.values.get, keys) if v is not None), None)

    def count(self, *keys: str, least: int = 1) -> int:
        value = self.get(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(" or ".join(keys), value, f"a whole number of at least {least}")
        return value

    def number(self, key: str, least: float = 0.0) -> float:
        """Greater than ``least``."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < float("inf"):
            wanted = "a positive number" if least == 0 else f"a number above {least}"
            raise self.error(key, value, wanted)
        return float(value)

    def counts(self, key: str) -> tuple[int, ...]:
        """A list of ids; one bare id counts as a list, null as an empty one."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(key, value, "an id or a list of ids")
        return tuple(ids)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def part(self, *keys: str) -> "Settings":
        """An object inside the config; empty when none of ``keys`` is set."""
        value = self.get(*keys) or {}
        if not isinstance(value, Mapping):
            raise self.error(" or ".join(keys), value, "an object")
        return Settings(self.where, value)

    def words(self, key: str, length: int) -> tuple[str, ...]:
        """A list of ``length`` names."""
        value = self.get(key)
        if not isinstance(value, list | tuple) or len(value) < length or not all(isinstance(v, str) for v in value):
            raise self.error(key, value, f"a list of {length} names")
        return tuple(value[:length])

    def only(self, key: str, *supported: Any) -> Any:
        """The value, or UnsupportedModel when it is none of ``supported``."""
        value = self.get(key)
        if value not in supported:
            wanted = ", ".join(map(str, supported))
            raise UnsupportedModel(self.where, f"{key} {value!r} is not supported; supported: {wanted}")
        return value

    def error(self, key: str, value: object, wanted: str) -> ModelError:
        state = "is missing" if value is None else f"is {value!r}"
        return ModelError(self.where, f"{key} {state}, but has to be {wanted}")
