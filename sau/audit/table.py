"""Audits as tables: a row for each network, a column for each step of what the attacker spent, means over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sau.audit.runner import ALONE, ANEW, BETWEEN, FRESH, NOISE, RELEASED, TRIGGER
from sau.errors import one_line
from sau.report.stats import MeanStd, mean_std
from sau.util import markdown

Audit = Mapping[str, Any]  # what `audit.json` holds
Key = tuple[str, str]  # part and curve

TITLES: dict[Key, str] = {
    ("before", ""): "As they are",
    ("relearn", RELEASED): "Re-learning from k poisons, augmented once (as released)",
    ("relearn", FRESH): "Re-learning from k poisons, every batch augmented anew",
    ("path", BETWEEN): "On the path from the attacked weights (0) to the purified ones (1)",
    ("path", ANEW): "On the same path, statistics of batch norm estimated anew",
    ("white", TRIGGER): "White box: trigger and universal D, by radius",
    ("white", ALONE): "White box: D on images without a trigger (gUAA), by radius",
    ("white", NOISE): "Trigger and noise, by radius",
}


def curves(audits: Sequence[Audit]) -> dict[Key, dict[str, dict[Any, MeanStd]]]:
    """ASR by part and curve, network, and what the attacker spent: one value for each audit, or draw of a lone one."""
    found: dict[Key, dict[str, dict[Any, list[float]]]] = {}
    for audit in audits:
        drawn: dict[tuple[Key, str, Any], list[float]] = {}
        for row in audit["rows"]:
            if "asr" in row:
                drawn.setdefault(((row["part"], row["curve"]), row["network"], row["x"]), []).append(row["asr"])
        for (key, network, x), values in drawn.items():
            line = found.setdefault(key, {}).setdefault(network, {})
            line.setdefault(x, []).extend(_independent(values, audits))
    return {
        key: {network: {x: MeanStd(tuple(values)) for x, values in line.items()} for network, line in lines.items()}
        for key, lines in found.items()
    }


def _independent(values: Sequence[float], audits: Sequence[Audit]) -> Sequence[float]:
    """Draws of the attacker's on one network do not count as networks where several are compared."""
    return values if len(audits) == 1 else [statistics.mean(values)]


def coefficients(audits: Sequence[Audit]) -> dict[str, dict[str, MeanStd | None]]:
    """`s` and `bec` by network; None where a value is not defined."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for audit in audits:
        for row in (row for row in audit["rows"] if row["part"] == "bec"):
            for name, values in found.setdefault(row["network"], {"s": [], "bec": []}).items():
                values.append(row[name])
    return {network: {name: mean_std(values) for name, values in some.items()} for network, some in found.items()}


def tables(audits: Sequence[Audit]) -> str:
    """Markdown: ASR in percent for every part, then BEC; mean ± standard deviation where there are several seeds."""
    n, draws = len(audits), len(audits[0]["asked"]["seeds"])
    over = f"{n} attacked networks" if n > 1 else f"{draws} draws of the attacker's"
    texts = [f"Mean ± standard deviation over {over}."] if n > 1 or draws > 1 else []
    for key, lines in curves(audits).items():
        steps = list(dict.fromkeys(x for line in lines.values() for x in line))
        heads = ["network", *(_step(key[0], x) for x in steps)]
        body = [[name, *(_text(line.get(x)) for x in steps)] for name, line in lines.items()]
        if key[0] in ("before", "relearn"):
            heads += ["ACC" if key[0] == "before" else f"ACC at {_step('relearn', steps[-1])}"]
            body = [[*cells, _text(_acc(audits, key, cells[0], steps[-1]))] for cells in body]
        texts.append(_table(TITLES.get(key, f"{key[0]}: trigger and the {key[1]}"), heads, body))
    found = coefficients(audits)
    if found:
        body = [[name, *(_text(value, 3) for value in values.values())] for name, values in found.items()]
        texts.append(_table("Backdoor existence coefficient", ["network", "s", "BEC"], body))
    return "\n\n".join(texts)


def _acc(audits: Sequence[Audit], key: Key, network: str, x: Any) -> MeanStd | None:
    values: list[float | None] = []
    for audit in audits:
        rows = (row for row in audit["rows"] if (row["part"], row["curve"]) == key)
        values += _independent([row["acc"] for row in rows if (row["network"], row["x"]) == (network, x)], audits)
    return mean_std(values)


def _step(part: str, x: Any) -> str:
    """The head of a column."""
    return {"before": "ASR", "relearn": f"k = {x}"}.get(part, str(x))


def _text(value: MeanStd | None, digits: int = 1) -> str:
    return "-" if value is None else value.text(digits)


def _table(title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return f"{one_line(title)}\n\n{markdown(heads, body)}".rstrip()
