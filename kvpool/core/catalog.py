"""What the numbers in a source's index stand for, as bytes that are kept beside it: namespaces, tenants, quotas."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Final

from kvpool.core.errors import BadArgument, KvpoolError, Overloaded
from kvpool.core.namespace import NamespaceSpec

_MAGIC: Final = b"kvpcat01"
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Catalog:
    """namespaces and tenants by number (tenant 0 is nobody, ""); quotas: (namespace, tenant, bytes),
    one of the two numbers -1."""

    namespaces: tuple[NamespaceSpec, ...]
    tenants: tuple[str, ...]
    quotas: tuple[tuple[int, int, int], ...]

    def to_bytes(self) -> bytes:
        """With version and checksum."""
        fields = {"namespaces": [asdict(n) for n in self.namespaces], "tenants": self.tenants, "quotas": self.quotas}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        return _MAGIC + _digest(text) + text

    @classmethod
    def from_bytes(cls, data: bytes) -> Catalog:
        """Raises: BadArgument if it is damaged, or of another version."""
        head = len(_MAGIC) + _DIGEST_BYTES
        text = data[head:]
        if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : head] != _digest(text):
            raise BadArgument("the segment's catalog is damaged or of another version", hint="the pool starts empty")
        try:
            fields = json.loads(text)
            catalog = cls(
                tuple(NamespaceSpec.from_mapping(spec) for spec in fields["namespaces"]),
                tuple(str(tenant) for tenant in fields["tenants"]),
                tuple((int(namespace), int(tenant), int(size)) for namespace, tenant, size in fields["quotas"]),
            )
        except KvpoolError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise BadArgument(f"the segment's catalog does not say what it should: {error}") from error
        if not catalog.tenants or catalog.tenants[0]:
            raise BadArgument("the segment's catalog does not begin with nobody's tenant")
        for namespace, tenant, size in catalog.quotas:
            known = -1 <= namespace < len(catalog.namespaces) and -1 <= tenant < len(catalog.tenants)
            if not known or (namespace < 0) == (tenant < 0) or size < 1:
                raise BadArgument("a quota in the segment's catalog is of nobody")
        return catalog


class Tenants:
    """Names of those whose bytes are counted, numbered as they come; 0 is nobody. None is ever forgotten."""

    def __init__(self, tenants_max: int) -> None:
        self._numbers: dict[str, int] = {"": 0}
        self._names: list[str] = [""]
        self._tenants_max = tenants_max

    @property
    def names(self) -> list[str]:
        """By number."""
        return self._names

    def number(self, name: str) -> int | None:
        return self._numbers.get(name)

    def name_of(self, number: int) -> str:
        return self._names[number]

    def add(self, name: str) -> int:
        """The number of a tenant, a new one for a new name. Raises: Overloaded."""
        number = self._numbers.get(name)
        if number is None:
            if len(self._names) > self._tenants_max:
                raise Overloaded(f"{self._tenants_max} tenants are known already")
            number = self._numbers[name] = len(self._names)
            self._names.append(name)
        return number


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:_DIGEST_BYTES]
