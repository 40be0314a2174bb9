"""What published studies say of the size of a teacher, compared with its student.

- Zhang et al. 2023 (arXiv 2311.07052): the best teacher of GPT-2 and Pythia students below 3
  billion parameters has 2.5 times theirs.
- Liu et al. 2024 (DDK, arXiv 2407.16154): for a student of 1.8 billion parameters, a teacher of 7.8
  times its size is better than one of 3.9 times.
- Gu et al. 2024 (MiniPLM, arXiv 2410.17215): for a student of 200 million parameters, 500 million
  are better than 300 million and 4 billion.

All of these are language models. Busbridge et al. 2025 (arXiv 2502.08606) find that a teacher's
size matters through its loss only. So a plan gives advice, and refuses nothing.
"""

from transformers import PreTrainedModel

from mmkd.modeling.loading import parameter_count
from mmkd_models.parts import find_parts

BEST = (2, 8)
"""Smallest and largest of the best ratios that the studies found."""
STEP = 2.5
"""Ratio of two models in a chain of teacher assistants."""
LEAST = 1.2
"""Ratio below which two models have the same size."""


def decoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of a decoder without its embeddings, all experts included."""
    embeddings = parameter_count(model.get_input_embeddings())
    return parameter_count(find_parts(model).decoder) - embeddings


def size_advice(teacher: int, student: int, name: str = "teacher") -> str | None:
    """A sentence on the sizes of two decoders; None if the teacher is hardly larger.

    Args:
        teacher, student: parameters of their decoders.
        name: of the teacher.
    """
    ratio = teacher / max(student, 1)
    if ratio < LEAST:
        return None
    owner = "the teacher's" if name == "teacher" else f"teacher {name}'s"
    text = (
        f"{owner} decoder has {ratio:.1f} times the student's parameters; published studies found "
        f"the best between {BEST[0]} and {BEST[1]}"
    )
    if ratio <= BEST[1]:
        return text
    return f"{text}; 'assistant' can train a student of about {STEP:g} times the size first"
