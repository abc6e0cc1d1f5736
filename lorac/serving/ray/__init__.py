"""A server on a Ray cluster: replicas of a front answer clients, replicas of a worker compute.

A request goes to a worker that has served its adapters before. If that worker dies, another worker continues the text
after the tokens that came; the client sees a pause.
"""

from lorac.serving.ray.cluster import RayServer, build_server

__all__ = ["RayServer", "build_server"]
