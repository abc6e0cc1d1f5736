"""Libraries of models: each module defines ``HOST``, a subclass of ``lorac.frontend.host.Host``."""
