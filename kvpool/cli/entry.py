"""Console scripts. The base install has no CLI libraries: says what to install rather than showing a traceback."""

from __future__ import annotations

import importlib
import sys


def _start(module: str) -> None:
    try:
        main = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("kvpool", "scheduler", "engines"):
            raise
        print(f"error: the command line needs {error.name!r}", file=sys.stderr)
        print("  hint: pip install 'kvpool[server]' (and 'kvpool[torch]' to run workers)", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # while everything is still being imported
        raise SystemExit(130) from None
    main()


def kvpool() -> None:
    _start("kvpool.cli.main")


def kvctl() -> None:
    _start("kvpool.cli.kvctl")
