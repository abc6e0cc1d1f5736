"""From a host to a graph: its sites marked, its attention marked where it is to keep a cache, one trace."""
