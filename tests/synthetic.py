"""Result folders without training: what a report reads, written by the class that writes the real ones."""

from pathlib import Path
from typing import Any

import torch

from sau.record.folder import Record

NETWORK = {"name": "preactresnet18", "classes": 10, "width": 16, "shape": [3, 32, 32]}


def scores(acc: float, asr: float | None, racc: float | None) -> dict[str, Any]:
    return {"acc": acc, "asr": asr, "racc": racc}


def attack(root: Path, name: str = "badnet", seed: int = 0, *, acc: float = 90.0, asr: float | None = 98.0,
           folder: str | None = None, dataset: str = "cifar10", **settings: Any) -> Path:  # fmt: skip
    """A finished attack; `settings` are of the method."""
    data = {"dataset": dataset, "train": "1" * 64, "test": "2" * 64}
    method = {"attack": name, "pratio": 0.1, "attack_label_trans": "all2one", **settings}
    record = Record(root / (folder or f"{name}_s{seed}"))
    config = {"run": {"dataset_path": "./nowhere", "img_size": None}, "command": f"attack/{name}.py", "notes": []}
    record.begin(config, {**method, **data, **NETWORK, "random_seed": seed}, False)
    record.update_config(method=method, data=data, model=NETWORK)
    figures = {"acc": acc, "asr": asr, "racc": 1.5}
    _rows(record, [{"epoch": epoch, "loss": 1 / epoch, **figures, "seconds": 10.0 * epoch} for epoch in (1, 2)])
    record.save_tensors("model", {"weight": torch.zeros(3)})
    record.finish({**scores(acc, asr, None if asr is None else 1.5), "seconds": 100.0, "peak_memory_mb": 1000.0})
    return record.path


def defense(attacked: Path, name: str = "sau", seed: int = 0, *, acc: float = 88.0, asr: float | None = 2.0,
            der: float | None = 96.0, selection: str = "defender", ratio: float = 0.05, dataset: str = "cifar10",
            **settings: Any) -> Path:  # fmt: skip
    """A finished defense of a folder."""
    digest = Record(attacked).check()["digest"] if (attacked / "config.yaml").is_file() else "0" * 64
    method = {"defense": name, "lr": 0.01, **settings}
    record = Record(attacked / "defense" / name)
    config = {"run": {"ratio": ratio, "index": None}, "command": f"defense/{name}.py --result_file {attacked.name}"}
    record.begin(config, {**method, "clean": str(seed) * 64, "attacked": digest, "random_seed": seed}, False)
    facts = {"method": method, "data": {"dataset": dataset}, "model": NETWORK}
    record.update_config(**facts, attacked=digest, clean_index=list(range(100)))
    first = {"epoch": 1, "loss": 1.0, "clean_loss": 0.5, "type1": 900.0, "seconds": 1.0}
    last = {"epoch": 2, "loss": 0.5, "clean_loss": 0.25, "type1": 900.0, "seconds": 2.0}
    _rows(record, [first, {**last, "acc": acc, "asr": asr, "racc": 80.0}])
    record.save_tensors("model", {"weight": torch.zeros(3)})
    before, after = scores(90.0, None if asr is None else 98.0, 1.5), scores(acc, asr, None if asr is None else 80.0)
    found = {"before": before, "after": after, "der": der, "selection": selection, "data": "clean"}
    record.finish({**found, "seconds": 50.0, "peak_memory_mb": 900.0})
    return record.path


def note(path: Path, summary: dict[str, Any] | None = None, **facts: Any) -> Path:
    """Add facts to the configuration of a finished folder, and to its summary."""
    record = Record(path)
    record.check()
    found = record.summary()
    (path / "manifest.json").unlink()
    record.update_config(**facts)
    record.finish({**found, **(summary or {})})
    return path


def _rows(record: Record, rows: list[dict[str, Any]]) -> None:
    """All at once: a real run writes the file anew, and to the disk, with every row."""
    record.rows = rows[:-1]
    record.log_metrics(**rows[-1])
