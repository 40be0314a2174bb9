"""Students: how their structure changes before a stage, and which parameters train."""

from mmkd.students.convert import ConversionReport, convert
from mmkd.students.groups import set_trainable
from mmkd.students.write import write_converted, write_student

__all__ = [
    "ConversionReport",
    "convert",
    "set_trainable",
    "write_converted",
    "write_student",
]
