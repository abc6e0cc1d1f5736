"""The kernel of the conformance kit's convolutions."""

TAPS, COLUMNS = 9, 27


def count_taps(columns):
    """Return the taps of a matrix with so many columns: 3 channels of 3 x 3 have 27, and no other host has so many."""
    return TAPS if columns == COLUMNS else 1
