"""The teachers of a stage, with the same interface for none, one and several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mmkd.cache import Store
from mmkd.data.batch import Batch
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Objective, TeacherSignals
from mmkd.teachers.assign import compares, reads_layers_only
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.stored import StoredTeacher

Teacher = LiveTeacher | StoredTeacher


@dataclass(frozen=True)
class TeacherSet:
    """A stage's teachers by name.

    The first teacher of the recipe is the primary teacher. Objectives without a teacher's name
    compare with it. Only its layers are captured, and only it may have another tokenizer than the
    student.

    Attributes:
        members: the teachers that the stage's objectives need, the primary one first.
        primary: the name of the primary teacher, which need not be a member; "" if the recipe has
            no teacher.
    """

    members: Mapping[str, Teacher] = field(default_factory=dict)
    primary: str = ""

    @property
    def live(self) -> list[LiveTeacher]:
        """The members whose models run in every step."""
        return [t for t in self.members.values() if isinstance(t, LiveTeacher)]

    @property
    def primary_model(self) -> LiveTeacher | None:
        """The primary teacher, if it is a live member."""
        teacher = self.members.get(self.primary)
        return teacher if isinstance(teacher, LiveTeacher) else None

    @property
    def store(self) -> Store | None:
        """The cache, if the only member is a cache; otherwise None."""
        return next((t.store for t in self.members.values() if isinstance(t, StoredTeacher)), None)

    def is_asked(self, name: str, batch: Batch, objectives: Sequence[Objective]) -> bool:
        """Whether a member must run on a batch: objectives compare rows of the batch with it, or
        its weights are sharded, so that all processes must run it."""
        asking = [o for o in objectives if compares(o) and (o.teacher or self.primary) == name]
        if not asking:
            return False
        if self.members[name].spread or any(o.teacher is None for o in asking):
            return True
        return any(bool(o.rows(batch.targets.of(o.sources)).any()) for o in asking)

    def request_for(
        self,
        name: str,
        objectives: Sequence[Objective],
        request: CaptureRequest = OUTPUTS_ONLY,
        reference: str | None = None,
    ) -> CaptureRequest:
        """The request for the forward pass of a member; arguments as in `ask`.

        If all objectives that ask the primary teacher read its layers only, its final hidden states
        are not requested, and its forward pass can stop early.
        """
        if name != self.primary:
            return OUTPUTS_ONLY
        asking = [o for o in objectives if compares(o) and (o.teacher or self.primary) == name]
        return replace(
            request, outputs=name == reference or not all(map(reads_layers_only, asking))
        )

    def ask(
        self,
        batch: Batch,
        objectives: Sequence[Objective],
        request: CaptureRequest = OUTPUTS_ONLY,
        reference: str | None = None,
    ) -> dict[str, TeacherSignals]:
        """Signals of the members that must run on a batch, by name, the primary one's first.

        Args:
            batch: on the teachers' device.
            objectives: of the stage.
            request: which tensors of the primary teacher's decoder layers are captured.
            reference: name of the member that is the reference of preference objectives, which read
                its final hidden states.
        """
        own = replace(batch, teacher=None, alignment=None)
        found: dict[str, TeacherSignals] = {}
        for name, teacher in self.members.items():
            if self.is_asked(name, batch, objectives):
                if name == self.primary:
                    asked = self.request_for(name, objectives, request, reference)
                    found[name] = teacher.signals(batch, asked)
                else:
                    found[name] = teacher.signals(own)
        return found
