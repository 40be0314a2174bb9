"""The teachers of a stage, asked in one way whether there are none, one or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mmkd.cache import Store
from mmkd.data.batch import Batch
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Objective, TeacherSignals
from mmkd.teachers.assign import compares
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.stored import StoredTeacher

Teacher = LiveTeacher | StoredTeacher


@dataclass(frozen=True)
class TeacherSet:
    """A stage's teachers by name.

    The primary teacher is the recipe's first one. Objectives that name no teacher compare with it,
    so only its layers are read, and only it may have tokens of its own: the others see the
    student's.

    Attributes:
        members: those that the stage's objectives need, the primary one first.
        primary: the name of the primary teacher, which may be no member; "" where the recipe has no
            teacher.
    """

    members: Mapping[str, Teacher] = field(default_factory=dict)
    primary: str = ""

    @property
    def live(self) -> list[LiveTeacher]:
        """The members that run beside the student."""
        return [t for t in self.members.values() if isinstance(t, LiveTeacher)]

    @property
    def primary_model(self) -> LiveTeacher | None:
        """The primary teacher, if it is a member that runs."""
        teacher = self.members.get(self.primary)
        return teacher if isinstance(teacher, LiveTeacher) else None

    @property
    def store(self) -> Store | None:
        """The cache that is read in place of a teacher, if there is one; it is the only member."""
        return next((t.store for t in self.members.values() if isinstance(t, StoredTeacher)), None)

    def is_asked(self, name: str, batch: Batch, objectives: Sequence[Objective]) -> bool:
        """Whether an objective compares some of a batch's rows with a member, or all processes have
        to run it together."""
        asking = [o for o in objectives if compares(o) and (o.teacher or self.primary) == name]
        if not asking:
            return False
        if self.members[name].spread or any(o.teacher is None for o in asking):
            return True
        return any(bool(o.rows(batch.targets.of(o.sources)).any()) for o in asking)

    def ask(
        self,
        batch: Batch,
        objectives: Sequence[Objective],
        request: CaptureRequest = OUTPUTS_ONLY,
    ) -> dict[str, TeacherSignals]:
        """Signals of the members that are asked about a batch, by name, the primary one's first.

        Args:
            batch: on the teachers' device.
            objectives: that compare it.
            request: what is read off the primary teacher's decoder layers.
        """
        own = replace(batch, teacher=None, alignment=None)
        found: dict[str, TeacherSignals] = {}
        for name, teacher in self.members.items():
            if self.is_asked(name, batch, objectives):
                primary = name == self.primary
                found[name] = teacher.signals(batch, request) if primary else teacher.signals(own)
        return found
