"""Slots: the replaceable inputs of a site, how adapters fill them, and the computation of an adapted site."""
