"""How long a merge will take on this machine: measured in seconds on pieces of its models, and extrapolated."""

from isomerge.estimate.calibration import estimate
from isomerge.estimate.totals import Estimate

__all__ = ["Estimate", "estimate"]
