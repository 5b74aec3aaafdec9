"""The pool of a whole cluster as one client: replicas on distinct nodes, reads from the best copy that is left."""

from kvpool.cluster.client import ClusterClient

__all__ = ["ClusterClient"]
