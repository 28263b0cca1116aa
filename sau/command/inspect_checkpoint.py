"""What is in a network file that somebody else made, without running anything in it.

    sau inspect FILE [--to FILE.safetensors] [--json]

FILE is a .pt, .pth, .ckpt, .safetensors or .onnx file; its content decides, not its name. The last line is the
verdict. Exit status: 0 harmless to open, 1 suspicious (it wants to import or run what weights do not need), 2
unreadable, or a mistake in the command. Weights that are harmless to open may still have a backdoor: that is what the
defenses are for.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sau.command.arguments import Parser
from sau.compat.inspect import HARMLESS, inspect, text


def main(argv: Sequence[str]) -> int:
    """Print the report of one file; the exit status is that of its verdict."""
    parser = Parser(__doc__, prog="sau inspect")
    parser.add_argument("file", type=Path, help="the file")
    parser.add_argument("--to", type=Path, help="write its tensors to this new file as safetensors, if it is harmless")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    asked = parser.parse_args(argv)
    report = inspect(asked.file, asked.to)
    print(json.dumps(report, indent=2) if asked.json else text(report))
    if asked.to is not None and report["status"] != HARMLESS:
        print(f"error: {asked.to} was not written, see the verdict", file=sys.stderr)
    status: int = report["status"]
    return status
