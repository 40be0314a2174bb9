"""Teachers: a model in memory, a model sharded over processes, or a cache on disk."""

from mmkd.teachers.assign import (
    ask_each,
    compares,
    limit_to_sources,
    needed_teachers,
    reads_layers_only,
)
from mmkd.teachers.by_stage import earlier_stage, with_stage_teachers
from mmkd.teachers.from_student import own_teacher
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.load import LoadedTeachers, TeacherPool, load_teachers
from mmkd.teachers.placement import choose_placement, place_teacher
from mmkd.teachers.reference import (
    LiveReference,
    Reference,
    choose_reference,
    reference_name,
    store,
)
from mmkd.teachers.sharded import ShardedTeacher
from mmkd.teachers.stored import StoredTeacher, check_storable
from mmkd.teachers.teacher_set import Teacher, TeacherSet

__all__ = [
    "LiveReference",
    "LiveTeacher",
    "LoadedTeachers",
    "Reference",
    "ShardedTeacher",
    "StoredTeacher",
    "Teacher",
    "TeacherPool",
    "TeacherSet",
    "ask_each",
    "check_storable",
    "choose_placement",
    "choose_reference",
    "compares",
    "earlier_stage",
    "limit_to_sources",
    "load_teachers",
    "needed_teachers",
    "own_teacher",
    "place_teacher",
    "reads_layers_only",
    "reference_name",
    "store",
    "with_stage_teachers",
]
