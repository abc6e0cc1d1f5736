"""Hosts by library: each module defines ``HOST``, a subclass of ``lorac.frontend.host.Host``."""
