"""A teacher's output distributions on disk: bits, shards, keys."""

from mmkd.cache.codec import RowCodec
from mmkd.cache.keys import HASH, picture_hash, processor_hash, record_key
from mmkd.cache.store import Store, StoreWriter

__all__ = [
    "HASH",
    "RowCodec",
    "Store",
    "StoreWriter",
    "picture_hash",
    "processor_hash",
    "record_key",
]
