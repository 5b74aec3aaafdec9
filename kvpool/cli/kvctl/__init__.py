"""`kvctl`: looks into a running cluster and works on it, over gRPC with its scheduler and its nodes."""

from __future__ import annotations

import os

# gRPC's own log lines would stand between the answers.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from kvpool.cli.kvctl.app import app, main
from kvpool.cli.kvctl.cluster import Cluster

__all__ = ["Cluster", "app", "main"]
