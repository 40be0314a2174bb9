"""Students: how their structure changes before a stage, and which parameters train."""

from mmkd.recipe import Conversion, ConversionConfig, add_conversion
from mmkd.students.convert import ConversionReport, convert, converted_processor
from mmkd.students.groups import check_groups, set_trainable
from mmkd.students.start import finished, start_folder, student_at, written_config
from mmkd.students.write import write_converted, write_student

__all__ = [
    "Conversion",
    "ConversionConfig",
    "ConversionReport",
    "add_conversion",
    "check_groups",
    "convert",
    "converted_processor",
    "finished",
    "set_trainable",
    "start_folder",
    "student_at",
    "write_converted",
    "write_student",
    "written_config",
]
