"""Check that layer-wise objectives fit student and teacher, before a run starts."""

from typing import Any

from mmkd.errors import RecipeError
from mmkd.modeling.capture_request import LayerPlan
from mmkd.modeling.layer_projections import PROJECTIONS, heads_of, width_of
from mmkd.objectives import Layerwise, MiniLm, Objective
from mmkd.recipe.context import StageContext
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.parts import find_parts

EAGER = "eager"
"""The implementation of attention that returns probabilities."""


def check_layers(context: StageContext) -> None:
    """Check that layer-wise objectives compare existing layers of the same width.

    Raises:
        RecipeError: they do not, or they need something that the stage or the teacher does not
            provide.
    """
    if context.teacher is None:
        return
    plan = LayerPlan.of(context.objectives)
    if context.stage.activation_checkpointing and (plan.forced or plan.matrices):
        # The backward pass would run the layers again, without the teacher's inputs.
        raise RecipeError(
            "teacher forcing does not work with activation checkpointing",
            where=context.where,
            hint="set activation_checkpointing to false, or teacher_forced",
        )
    mine, theirs = (find_parts(m).decoder_layers for m in (context.student, context.teacher))
    for objective in context.objectives:
        if not (isinstance(objective, Layerwise) or objective.pairs):
            continue
        where = context.at(objective)
        if not objective.pairs:
            raise _nothing_to_compare(objective, where)
        for s, t in objective.pairs:
            if not (0 <= s < len(mine) and 0 <= t < len(theirs)):
                raise RecipeError(
                    f"cannot pair student layer {s} (of {len(mine)}) with teacher layer {t} "
                    f"(of {len(theirs)})",
                    where=where,
                    hint="set 'layers' and 'teacher_layers'",
                )
            check_attention(where, {f"student layer {s}": mine[s], f"teacher layer {t}": theirs[t]})
            if isinstance(objective, MiniLm):
                compared = {"student": mine[s], "teacher": theirs[t]}
                _check_heads(objective, where, compared)
                if "query_key" in objective.config.relations:
                    _check_attention_heads(where, compared)
            widths = [_widths(layer) for layer in (mine[s], theirs[t])]
            if objective.compares_widths and widths[0] != widths[1]:
                raise RecipeError(
                    f"student layer {s} has widths {widths[0]}, teacher layer {t} {widths[1]}",
                    where=where,
                    hint="compare layers of the same width (residual stream, heads)",
                )
        if "matrices" in objective.needs:
            _check_probabilities(context, objective, [mine[s] for s, _ in objective.pairs])


def _check_probabilities(context: StageContext, objective: Objective, layers: list[Any]) -> None:
    """Check that attention layers return their probabilities.

    Args:
        context: of the stage.
        objective: that reads them.
        layers: of the student, that it reads.

    Raises:
        RecipeError: the implementation of a model's attention computes none.
    """
    teacher = context.recipe.teacher
    assert teacher is not None
    attends = any(not isinstance(layer.self_attn, Mamba2Mixer) for layer in layers)
    how = {
        "teacher": teacher.attn_implementation,
        "student": context.recipe.student.attn_implementation if attends else EAGER,
    }
    for role, implementation in how.items():
        if implementation != EAGER:
            raise RecipeError(
                f"it needs the {role}'s attention probabilities",
                where=context.at(objective),
                hint=f"set {role}.attn_implementation to {EAGER}",
            )


def _nothing_to_compare(objective: Objective, where: str) -> RecipeError:
    """The error for an objective without pairs of layers."""
    what = "the student has no Mamba layers to compare"
    if isinstance(objective, MiniLm):
        role = "teacher" if objective.attention_layers else "student"
        what = f"the {role} has no layer with attention for 'layers: last'"
    return RecipeError(what, where=where, hint="name 'layers'")


def check_attention(where: str, layers: dict[str, Any]) -> None:
    """Check that layers have an attention, or a mixer in its place.

    Args:
        where: the objective, for the message.
        layers: by their names in messages.

    Raises:
        RecipeError: a layer has neither.
    """
    for name, layer in layers.items():
        if not hasattr(getattr(layer, "self_attn", None), "o_proj"):
            raise RecipeError(
                f"{name} has no self_attn with an o_proj to compare",
                where=where,
                hint="name layers that have attention",
            )


def _check_heads(objective: MiniLm, where: str, layers: dict[str, Any]) -> None:
    """Check that queries, keys and values can be read separately, and that the number of relation
    heads divides their widths."""
    for role, layer in layers.items():
        for relation in objective.config.relations:
            if relation == "query_key":
                for kind in ("queries", "keys"):
                    _width(layer, kind, role, where)
                continue
            width = _width(layer, relation, role, where)
            if width % objective.config.heads:
                raise RecipeError(
                    f"{objective.config.heads} relation heads do not divide the {role}'s "
                    f"{PROJECTIONS[relation]} of width {width}",
                    where=where,
                    hint="choose 'heads' that divides all widths, or other 'relations'",
                )


def _width(layer: Any, kind: str, role: str, where: str) -> int:
    """Width of a layer's queries, keys or values."""
    try:
        return width_of(layer.self_attn, kind)
    except ValueError as error:
        raise RecipeError(
            f"it cannot read the {role}'s {kind}: {error}",
            where=where,
            hint="choose other layers or 'relations', or another objective",
        ) from error


def _check_attention_heads(where: str, layers: dict[str, Any]) -> None:
    """Check that the layers have the same number of attention heads."""
    heads = {role: heads_of(layer.self_attn) for role, layer in layers.items()}
    hint = "leave query_key out of 'relations'"
    for role, count in heads.items():
        if count is None:
            owner = type(layers[role].self_attn).__name__
            raise RecipeError(
                f"it cannot tell the number of heads of the {role}'s {owner}",
                where=where,
                hint=hint,
            )
    if len(set(heads.values())) > 1:
        raise RecipeError(
            "query_key needs equal numbers of attention heads, and the "
            + ", the ".join(f"{role} has {count}" for role, count in heads.items()),
            where=where,
            hint=hint,
        )


def _widths(layer: Any) -> tuple[int, int]:
    """Width of the residual stream, and total width of the heads."""
    return layer.self_attn.o_proj.out_features, layer.self_attn.o_proj.in_features
