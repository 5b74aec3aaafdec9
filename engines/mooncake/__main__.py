"""`python -m engines.mooncake path`: the folder to put first on PYTHONPATH. `check`: which mooncake is imported."""

from __future__ import annotations

import argparse
import importlib
import sys

from engines.mooncake.shadowing import SHIM, shadowed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engines.mooncake", description=__doc__)
    parser.add_argument("command", choices=("path", "check"))
    if parser.parse_args().command == "path":
        print(SHIM)
        if text := shadowed():
            print(f"with this folder first on PYTHONPATH, {text}", file=sys.stderr)
        return 0
    try:
        store = importlib.import_module("mooncake.store")
    except ImportError as error:
        print(f"no mooncake.store can be imported: {error}")
        return 1
    ours = str(store.__file__ or "").startswith(str(SHIM))
    print(f"mooncake.store is {'kvpool' if ours else 'not kvpool'}'s: {store.__file__}")
    return 0 if ours else 1


if __name__ == "__main__":
    sys.exit(main())
