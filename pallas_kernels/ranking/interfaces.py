"""Constants that callers and kernels share."""

# Probabilities are added as integers, in any order alike: units of a probability of 1,
# at which sums stop.
MASS_UNITS = 1 << 30
