"""What pages read of environments, deployments and approvals."""

from __future__ import annotations

from dashboard.selectors.approvals import approval_live, approval_problems, certificate_valid, policy_active

__all__ = ["approval_live", "approval_problems", "certificate_valid", "policy_active"]
