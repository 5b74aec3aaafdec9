"""What tells one model from another."""

from __future__ import annotations

from pathlib import Path

from engines.attached.fingerprint import folder_digest


def test_models_are_told_apart(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1 << 20))
    assert folder_digest(one) == folder_digest(other) != ""
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(1 << 19)
        file.write(b"\1")
    assert folder_digest(one) != folder_digest(other)
    (other / "model.safetensors").write_bytes(bytes((1 << 20) + 1))
    assert folder_digest(one) != folder_digest(other)
    assert folder_digest(tmp_path / "none") == folder_digest(tmp_path) == ""
