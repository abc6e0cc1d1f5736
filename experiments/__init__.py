"""Claims of papers, tried in minutes: seeds, error bars, and a verdict.

`python -m experiments.<name>` prints its tables; `--smoke` runs it in seconds, without figures worth reading.
`python -m experiments` runs all and writes docs/experiments.md.
"""
