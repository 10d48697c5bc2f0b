"""SR-VN: square-root variational Newton."""

from clients.srvn.solver import SRVNSolver

__all__ = ["SRVNSolver"]
