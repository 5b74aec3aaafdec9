"""What a cluster client returns. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.service.client_types import Bools


@dataclass(frozen=True, eq=False)
class ClusterPutResult:
    """`copies`: of each key, on distinct nodes, by this call or before it. `stored`, `existed`: at least one of that
    kind. `hosts_shared`: copies of the key lie on one host, since no other one took it. `being_written`: by somebody
    else, on some node; not stored a second time beside that."""

    copies: NDArray[np.int64]
    stored: Bools
    existed: Bools
    hosts_shared: Bools
    being_written: Bools
    bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class ClusterGetResult:
    """`found`: the row holds the block, checked. `corrupt`: some copy was bad, and no good one was found.
    `sources`: id of the node that each was read from, empty where not found."""

    found: Bools
    corrupt: Bools
    sources: list[str]
    bytes: int
    seconds: float


@dataclass(frozen=True, eq=False)
class ClusterObjectsResult:
    """`values[i]`: uint8, the object's bytes, checked; None where no node has it. The rest as in ClusterGetResult."""

    values: list[NDArray[np.uint8] | None]
    corrupt: Bools
    sources: list[str]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class ClusterRemoveResult:
    """`copies` removed, on all nodes together; `unreached`: nodes that could not be asked, and may have some still."""

    copies: int
    unreached: list[str]
