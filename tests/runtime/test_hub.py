"""Commits of models and data sets, from a server that speaks the Hub's protocol."""

import pytest

from mmkd.recipe import load_recipe
from mmkd.runs.reads import reads_of
from mmkd.runtime import hub as hub_module
from tests.support import hub_server
from tests.support.recipes import tiny_recipe


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_module, "_answers", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server.in_place(monkeypatch) as found:
        found.repos["me/model"] = hub_server.Repo(False)
        yield found


@pytest.mark.parametrize("commit", [hub_module.model_commit, hub_module.data_commit])
def test_the_commit_is_the_hubs(hub, commit):
    first = hub.repos["me/model"].sha
    assert commit("me/model", None) == first
    hub.repos["me/model"].commits += 1
    assert commit("me/model", None) == hub.repos["me/model"].sha != first
    assert commit("me/nothing", None) is None


def test_a_folder_has_no_commit(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    for name in ("me/model", str(tmp_path), "", "model"):
        assert hub_module.model_commit(name, None) is None
    assert hub.requests == []


def test_without_the_hub_it_is_that_of_the_download(hub, tmp_path, monkeypatch):
    from huggingface_hub import hf_hub_download

    held = hub.repos["me/model"]
    held.files["config.json"] = b"{}"
    first = held.sha
    folder = str(tmp_path / "hub")
    hf_hub_download("me/model", "config.json", cache_dir=folder)
    monkeypatch.setattr(hub_module, "unreachable", lambda: "no network")
    find = hub_module.try_to_load_from_cache
    monkeypatch.setattr(
        hub_module, "try_to_load_from_cache", lambda *a, **k: find(*a, cache_dir=folder, **k)
    )
    held.commits += 1
    assert hub_module.model_commit("me/model", None) == first
    assert hub_module.model_commit("me/nothing", None) is None


def test_a_stage_reads_the_commit_of_a_teacher_from_the_hub(hub, scenes_dir, tiny_model_dir):
    raw = tiny_recipe(scenes_dir, tiny_model_dir, scenes_dir, teacher={"model": "me/model"})
    raw["stages"][0]["objectives"] = [{"kind": "kl"}]
    recipe = load_recipe(raw)
    before = reads_of(recipe, 0, recipe.student).commits
    assert before == {"me/model": hub.repos["me/model"].sha}
    hub.repos["me/model"].commits += 1
    assert reads_of(recipe, 0, recipe.student).commits != before
