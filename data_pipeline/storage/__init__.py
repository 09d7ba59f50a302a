"""Object stores: one small interface over a local folder and over S3."""

from data_pipeline.storage.local import LocalStore
from data_pipeline.storage.store import ObjectInfo, ObjectNotFound, ObjectStore, StoreError, canonical_json, open_store

__all__ = ["LocalStore", "ObjectInfo", "ObjectNotFound", "ObjectStore", "StoreError", "canonical_json", "open_store"]
