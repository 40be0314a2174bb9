"""Where teacher signals come from."""

from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.reference import LiveReference, Reference, choose_reference, store

__all__ = ["LiveReference", "LiveTeacher", "Reference", "choose_reference", "store"]
