"""Adapters that the tenants of a server bring while it runs. None is trusted."""

from lorac.serving.settings import StoreQuotas
from lorac.serving.store.store import AdapterStore, TenantAdapter

__all__ = ["AdapterStore", "StoreQuotas", "TenantAdapter"]
