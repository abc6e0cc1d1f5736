"""Pages that run a compiled language model in browsers: a folder that any web server serves as static files."""

from lorac.web.export import export_web

__all__ = ["export_web"]
