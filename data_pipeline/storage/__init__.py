"""Object stores: one small interface, a local folder now, others behind the same calls."""

from data_pipeline.storage.local import LocalStore
from data_pipeline.storage.store import ObjectInfo, ObjectNotFound, ObjectStore, canonical_json, open_store

__all__ = ["LocalStore", "ObjectInfo", "ObjectNotFound", "ObjectStore", "canonical_json", "open_store"]
