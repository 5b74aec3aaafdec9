"""Generate the Python code of proto/kvpool/v1 into kvpool/v1.

python tools/generate_proto.py            # writes
python tools/generate_proto.py --check    # exit 1 if the checked-in code is not what would be written
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generate(out: Path) -> None:
    import grpc_tools
    from grpc_tools import protoc

    include = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(p) for p in PROTO.rglob("*.proto"))
    flags = [f"-I{PROTO}", f"-I{include}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *flags, *sources]) != 0:
        raise SystemExit("protoc failed")


def generated(folder: Path) -> dict[str, str]:
    """Text of each generated module; services without RPCs get no empty gRPC module."""
    modules = {p.name: p.read_text() for p in sorted(folder.glob("*")) if p.name.endswith(SUFFIXES)}
    return {n: t for n, t in modules.items() if not n.endswith("_grpc.py") or "Servicer" in t}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    target = ROOT / "kvpool" / "v1"
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = generated(Path(folder) / "kvpool" / "v1")
    if args.check:
        stale = sorted(n for n in fresh.keys() | generated(target).keys() if generated(target).get(n) != fresh.get(n))
        for name in stale:
            print(f"kvpool/v1/{name} is stale: run `python tools/generate_proto.py`", file=sys.stderr)
        return 1 if stale else 0
    for name in generated(target).keys() - fresh.keys():
        (target / name).unlink()
    for name, text in fresh.items():
        (target / name).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
