"""A kvpool worker inside your own process: python examples/embed_worker.py MODEL [SCHEDULER NODE].

Start `kvpool scheduler`, `kvpool node` and `kvpool gateway` first and name the addresses of the first two; without them
the worker serves whoever connects to it.
"""

import sys

from engines.torch.worker import EngineWorker, WorkerConfig


def main(model: str, scheduler: str = "", node: str = "") -> None:
    config = WorkerConfig(model=model, scheduler=scheduler, node=node, instance_id="embedded-0", role="both")
    with EngineWorker(config) as worker:
        print(f"{worker.model.name} is served at {worker.address}; press Enter to stop", flush=True)
        sys.stdin.readline()
        print({name: count for name, count in worker.counters().items() if count})


if __name__ == "__main__":
    main(*sys.argv[1:])
