"""What it takes to bring a backdoor back: an audit of purified networks from the attacker's side (docs/audit.md)."""

from sau.audit.asked import PARTS, Asked
from sau.audit.carry import carry_out
from sau.audit.case import Case, Network, open_case
from sau.audit.plan import Plan
from sau.audit.table import tables

__all__ = ["PARTS", "Asked", "Case", "Network", "Plan", "carry_out", "open_case", "tables"]
