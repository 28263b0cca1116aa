"""What it takes to bring a backdoor back: an audit of purified networks from the attacker's side (docs/audit.md)."""

from sau.audit.runner import PARTS, AuditConfig, Case, open_case, run_audit
from sau.audit.tables import draw, read, tables

__all__ = ["PARTS", "AuditConfig", "Case", "draw", "open_case", "read", "run_audit", "tables"]
