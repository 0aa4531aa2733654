"""The scale of a row in FP8, which is e4m3 here."""

LARGEST = 448.0  # of e4m3: a row's largest number becomes this
# Rows of zeros, or nearly so, would else be divided by a scale that is none.
LEAST_MAXIMUM = 2.0**-100
