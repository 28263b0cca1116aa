"""The anomaly indices of networks without a backdoor, which the report on a network of one's own ranks its own among.

    python scripts/clean_indices.py RECORD [RECORD ...] [--passes 40] [--dataset_path DIR] [--out FILE]

for records of attack/prototype.py. Networks that the file has already are not searched again.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.errors import ConfigError, run_command
from sau.files import read_json, write
from sau.own_network import reverse
from sau.record import attack_result
from sau.tools import Parser, add_device, use_device

HOME = Path(__file__).resolve().parents[1] / "sau" / "clean_indices.json"


def kept(file: Path) -> dict[str, Any]:
    """What the file has already; ConfigError if it is no such file."""
    try:
        content = read_json(file)
        if not isinstance(content["passes"], int) or not all(network["digest"] for network in content["networks"]):
            raise ValueError("passes is no number, or a network has no digest")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no list of clean networks ({error}); mend it or name another --out") from None
    return content


def main() -> int:
    """Search every network and write the file after each; exit status 2 for a user's mistake."""
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path, nargs="+", help="result folders of attack/prototype.py")
    parser.add_argument("--passes", type=int, default=40, help="passes of the search [40]")
    parser.add_argument("--dataset_path", help="folder of the data sets [as the records had it]")
    parser.add_argument("--out", type=Path, default=HOME, help="file to write [that of the library]")
    add_device(parser)
    asked = parser.parse_args()
    where = use_device(asked)
    content = kept(asked.out) if asked.out.exists() else {"passes": asked.passes, "networks": []}
    if content["passes"] != asked.passes:
        raise ConfigError(
            f"{asked.out} was made with {content['passes']} passes; ask for as many or name another --out"
        )
    for path in asked.records:
        clean = attack_result.load(path)
        if clean.triggered is not None:
            raise ConfigError(f"{path} has a trigger; wanted are records of attack/prototype.py")
        if clean.digest in {network["digest"] for network in content["networks"]}:
            continue
        test = clean.images(asked.dataset_path)[1]
        found = reverse(clean.model().to(where), test.to(where), asked.passes)
        if found is None or found["index"] is None:
            raise ConfigError(f"{path}: the norms of its classes give no index; wanted are three classes and more")
        about = {"dataset": clean.dataset, "classes": len(found["norms"]), "width": clean.network["width"]}
        about["digest"] = clean.digest
        content["networks"].append({**about, "class": found["class"], "index": round(found["index"], 3)})
        write(asked.out, (json.dumps(content, indent=1) + "\n").encode())
        print(f"{path}: class {found['class']}, index {found['index']:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
