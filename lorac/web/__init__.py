"""Pages that run a compiled language model in browsers: a folder for any web server, which computes nothing itself."""

from lorac.web.export import export_web

__all__ = ["export_web"]
