"""What a server's /metrics page says, as far as it is asked for. Pure.

Source: Prometheus text format 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True, slots=True)
class MetricsPage:
    """Sums over all label sets of each name, and the labels of the last one."""

    values: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def value(self, name: str, default: float = 0.0) -> float:
        return self.values.get(name, default)


def read_page(text: str, names: Collection[str]) -> MetricsPage:
    """Only lines of `names` are looked into; lines that make no sense are passed over."""
    values: dict[str, float] = {}
    labels: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        end = min((at for at in (line.find("{"), line.find(" ")) if at > 0), default=0)
        name = line[:end]
        if name not in names:
            continue
        told, _, rest = line[end:].rpartition("}")
        try:
            value = float(rest.split()[0])
        except (ValueError, IndexError):
            continue
        values[name] = values.get(name, 0.0) + value
        labels[name] = {key: _unescaped(text) for key, text in _LABEL.findall(told)}
    return MetricsPage(values, labels)


def _unescaped(text: str) -> str:
    return re.sub(r"\\.", lambda found: _ESCAPES.get(found.group(), found.group()), text)
