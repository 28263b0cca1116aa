"""What it takes to bring a backdoor back: an audit of purified networks from the attacker's side (docs/audit.md)."""

from sau.audit.case import PARTS, AuditConfig, Case, open_case
from sau.audit.runner import read, run_audit, tables

__all__ = ["PARTS", "AuditConfig", "Case", "open_case", "read", "run_audit", "tables"]
