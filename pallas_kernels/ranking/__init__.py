"""Selection of the largest entries of draft maps."""

from pallas_kernels.ranking.interfaces import MASS_UNITS

__all__ = ["MASS_UNITS"]
