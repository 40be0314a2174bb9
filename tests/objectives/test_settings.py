"""Settings define the needs of objectives, and can be imported without torch."""

from typing import ClassVar, Literal, get_args

import pytest
from pydantic import ValidationError

from mmkd.objectives import REGISTRY, HeadObjective, HeadObjectiveConfig, build_objective
from mmkd.objectives.base_settings import Need, ObjectiveConfig
from mmkd.objectives.exit_settings import ExitsConfig
from mmkd.objectives.layer_settings import RelationConfig
from mmkd.objectives.settings import SETTINGS, PreferenceConfig
from mmkd.runtime.registry import settings_kinds

NEEDS = {
    "ce": {"distribution"},
    "kl reverse_kl jeffreys tvd jsd skew_kl skew_reverse_kl": {"teacher", "distribution"},
    "soft_reverse_kl hellinger pearson neyman alpha": {"teacher", "distribution"},
    "balanced_kl enhanced": {"teacher", "distribution"},
    "relation affinity exits sinkhorn": {"teacher", "distribution"},
    "alm uld": {"teacher", "distribution", "chunks"},
    "mixer_mse layer_l2 hidden_mse mutual embedding": {"teacher", "layers"},
    "matrix": {"teacher", "layers", "matrices"},
    "minilm": {"teacher", "layers", "projections"},
    "token_labels": {"vision_labels", "distribution"},
    "balance router_z": {"experts"},
    "preference": {"teacher", "distribution", "pairs"},
}
OF_HIDDEN = {"relation", "affinity"}
WITH_LAYERS = {"minilm", "mutual", "exits"}
KINDS = [(kind, settings) for settings in SETTINGS for kind in settings_kinds(settings)]


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=[kind for kind, _ in KINDS])
def test_needs_of_each_kind(kind, settings):
    config = settings(kind=kind, **({"layers": [0]} if kind in WITH_LAYERS else {}))
    objective = build_objective(config)
    (wanted,) = [needs for kinds, needs in NEEDS.items() if kind in kinds.split()]
    assert config.needs == objective.needs == wanted
    assert config.needs <= {*get_args(Need)}
    assert (config.reads_hidden != ()) is (kind in OF_HIDDEN)
    assert config.reads_hidden == objective.reads_hidden
    on_head = issubclass(REGISTRY[kind], HeadObjective)
    assert isinstance(config, HeadObjectiveConfig) is on_head
    of_outputs = OF_HIDDEN | {"exits", "sinkhorn"}
    assert config.compares_outputs is ((on_head and kind != "ce") or kind in of_outputs)
    assert config.metric_name == objective.name == kind


def test_needs_follow_other_settings():
    for reference in ("self", "none"):
        config = PreferenceConfig(kind="preference", reference=reference)
        assert config.needs == {"distribution", "pairs"}
    for changes in ({"teacher": "self"}, {"loss": "ce"}):
        exits = ExitsConfig(kind="exits", layers=[0], **changes)
        assert exits.needs == {"distribution"}
        assert not exits.compares_outputs
    assert RelationConfig(kind="relation", region="response").reads_hidden == ("response",)


def test_an_unknown_need_is_named():
    class Misspelt(ObjectiveConfig):
        kind: Literal["misspelt"]
        needs: ClassVar = frozenset({"teachr"})

    with pytest.raises(ValidationError, match="'teachr', which is unknown -- did you mean 'tea"):
        Misspelt(kind="misspelt")


def test_a_recipe_cannot_change_what_is_needed():
    with pytest.raises(ValidationError, match="needs"):
        RelationConfig.model_validate({"kind": "relation", "needs": []})


def test_the_head_of_an_objective_is_given_when_it_is_built():
    config = RelationConfig(kind="relation")
    made = build_objective(config, head_memory=7, head_backend="torch")
    assert (made.head_memory, made.head_backend) == (7, "torch")
    made = made.for_teacher("other", 0.5, None)
    assert (made.head_memory, made.head_backend) == (7, "torch")
