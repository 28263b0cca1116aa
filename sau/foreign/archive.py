"""The zip archive around a torch file of a stranger: looked at before torch reads anything in it."""

import io
import zipfile
from collections.abc import Iterable

MEMBERS = 10_000  # the network with the most tensors has 967
PICKLE = 64 << 20  # bytes of the pickle: 110,000 picture paths take 29 MB
PICKLE_WITH_PICTURES = 512 << 20  # 20,000 pictures of 64x64 take 370 MB


def holds_program(names: Iterable[str]) -> bool:
    """Whether an archive with members of these names holds TorchScript."""
    return any("/code/" in name or name.endswith("/constants.pkl") for name in names)


def check(raw: bytes) -> None:
    """Refuse an archive by its table of contents: ValueError, or what zipfile raises.

    At most `MEMBERS` members, none compressed, so that the content is no larger than the file, none overlapping or
    twice there, every CRC-32 right, and one pickle, not too large.
    """
    if raw[:4] != b"PK\x03\x04":
        raise ValueError("it is no torch zip file; who made it can save it as one, with torch 1.6 or later")
    # Two readers of a zip file agree on where its table is only if its end is at the end.
    if raw[-22:-18] != b"PK\x05\x06" or raw[-2:] != b"\0\0":
        raise ValueError("it does not end like a torch zip file; it is truncated or has something appended")
    if raw.count(b"PK\x01\x02") > MEMBERS:
        raise ValueError(f"its archive has more than {MEMBERS:,} members")
    with zipfile.ZipFile(io.BytesIO(raw)) as found:
        if found.start_dir != _table(raw):
            raise ValueError("its table of contents is not where it says, so two readers would find two")
        members = found.infolist()
        names = [member.filename for member in members]
        pickled = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickled) != 1 or holds_program(names):
            raise ValueError("it is TorchScript or no archive of torch.save; save a dictionary with torch.save")
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise ValueError("its archive is compressed, as torch.save never does")
        if len({*names}) != len(names) or sum(member.file_size for member in members) > len(raw):
            raise ValueError("members of its archive overlap or are there twice")
        limit = PICKLE_WITH_PICTURES if b"cPIL.Image\n" in found.read(pickled[0]) else PICKLE
        if pickled[0].file_size > limit:
            raise ValueError(f"its pickle has {pickled[0].file_size:,} bytes, allowed are {limit:,}")
        if (bad := found.testzip()) is not None:
            raise ValueError(f"CRC-32 of its member {ascii(bad)[:60]} differs")


def _table(raw: bytes) -> int:
    """Where torch looks for the table of contents: where the end says, or the zip64 record that a locator names.

    Python takes what lies before them instead.
    """
    end = len(raw) - 22
    if raw[end - 20 : end - 16] != b"PK\x06\x07":
        return int.from_bytes(raw[end + 16 : end + 20], "little")
    if int.from_bytes(raw[end - 12 : end - 4], "little") != end - 76 or raw[end - 76 : end - 72] != b"PK\x06\x06":
        raise ValueError("its zip64 record is not where it says")
    return int.from_bytes(raw[end - 28 : end - 20], "little")
