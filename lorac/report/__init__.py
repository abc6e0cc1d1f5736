"""Reports on programs for people: rows, printed text, explanations, pictures."""
