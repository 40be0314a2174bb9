"""A teacher's output distributions on disk: encoding of rows, shards, keys of records."""

from mmkd.cache.codec import RowCodec
from mmkd.cache.keys import HASH, picture_hash, processor_hash, record_key
from mmkd.cache.store import Store, StoreWriter, drop_damaged

__all__ = [
    "HASH",
    "RowCodec",
    "Store",
    "StoreWriter",
    "drop_damaged",
    "picture_hash",
    "processor_hash",
    "record_key",
]
