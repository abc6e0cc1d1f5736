"""What methods are said to do, tried in minutes: seeds, error bars, and what does not separate.

`python -m experiments.<name>` prints its tables; `--smoke` runs it in seconds, without figures worth reading.
"""
