"""A teacher's output distributions on disk: bits, shards, keys."""

from mmkd.cache.codec import RowCodec
from mmkd.cache.keys import processor_hash, record_key
from mmkd.cache.store import Store, StoreWriter

__all__ = ["RowCodec", "Store", "StoreWriter", "processor_hash", "record_key"]
