"""Where teacher signals come from."""

from mmkd.teachers.live import LiveTeacher

__all__ = ["LiveTeacher"]
