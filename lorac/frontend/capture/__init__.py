"""From a host to a graph: sites and attention become ops, and one trace records them."""
