"""Adapters that tenants upload while a server runs. No upload is trusted."""

from lorac.serving.settings import StoreQuotas
from lorac.serving.store.store import AdapterStore, TenantAdapter

__all__ = ["AdapterStore", "StoreQuotas", "TenantAdapter"]
