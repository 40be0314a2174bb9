"""Check that layer-wise objectives fit student and teacher, before a run starts."""

from typing import Any

from mmkd.errors import RecipeError
from mmkd.modeling.capture_request import LayerPlan
from mmkd.modeling.layer_projections import PROJECTIONS, width_of
from mmkd.objectives import Layerwise, MiniLm
from mmkd.recipe.context import StageContext
from mmkd_models.parts import find_parts


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
        if not isinstance(objective, Layerwise):
            continue
        where = context.at(objective)
        if not objective.pairs:
            raise RecipeError(
                "the student has no Mamba layers to compare", where=where, hint="name 'layers'"
            )
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
                _check_heads(objective, where, {"student": mine[s], "teacher": theirs[t]})
            widths = [_widths(layer) for layer in (mine[s], theirs[t])]
            if objective.compares_widths and widths[0] != widths[1]:
                raise RecipeError(
                    f"student layer {s} has widths {widths[0]}, teacher layer {t} {widths[1]}",
                    where=where,
                    hint="compare layers of the same width (residual stream, heads)",
                )
        teacher = context.recipe.teacher
        assert teacher is not None
        if "matrices" in objective.needs and teacher.attn_implementation != "eager":
            raise RecipeError(
                "it needs the teacher's attention probabilities",
                where=where,
                hint="set teacher.attn_implementation to eager",
            )


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
            try:
                width = width_of(layer.self_attn, relation)
            except ValueError as error:
                raise RecipeError(
                    f"it cannot read the {role}'s {relation}: {error}",
                    where=where,
                    hint="choose other layers or 'relations', or another objective",
                ) from error
            if width % objective.config.heads:
                raise RecipeError(
                    f"{objective.config.heads} relation heads do not divide the {role}'s "
                    f"{PROJECTIONS[relation]} of width {width}",
                    where=where,
                    hint="choose 'heads' that divides all widths, or other 'relations'",
                )


def _widths(layer: Any) -> tuple[int, int]:
    """Width of the residual stream, and total width of the heads."""
    return layer.self_attn.o_proj.out_features, layer.self_attn.o_proj.in_features
