"""From a host to a graph: its sites and its attention become ops, and one trace records them."""
