"""Names of the indices by which packed tokens (``packing``) become those of segments, and segments' tokens packed."""

TO_SEGMENTS, FROM_SEGMENTS = "lorac.to_segments", "lorac.from_segments"
FROM_ROWS = "lorac.from_rows"
"""The indices by which tokens of padded rows are packed."""
