"""Which format a file is in, by its bytes."""

from pathlib import Path

from sau.foreign.torchfile import LEGACY

ZIP, OLD, SAFE, ONNX = "torch zip archive", "torch before 1.6", "safetensors", "ONNX"


def file_format(path: Path, raw: bytes) -> str:
    """The format of a file that may be harmful or damaged; "" for none that is known here."""
    if raw[8:9] == b"{":
        return SAFE
    if raw[:1] == b"\x08" and path.suffix == ".onnx":  # a protobuf has no mark of its own
        return ONNX
    if raw.startswith(LEGACY):
        return OLD
    if raw[:4] == b"PK\x03\x04":
        return ZIP if b"/data.pkl" in raw else "zip archive"
    return "pickle" if raw[:1] == b"\x80" else ""
