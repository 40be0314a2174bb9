"""`mmkd chat` and its conversations."""

import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from mmkd.cli import main
from mmkd.commands import chat as chat_module
from mmkd.errors import DataError
from mmkd.modeling.conversation import Conversation, load_answering
from mmkd.recipe import SamplingConfig
from tests.support.places import ROOT

TEACHER = str(ROOT / "assets" / "scenes_teacher")
ASK = "What do you see?"


@pytest.fixture(scope="module")
def teacher():
    return load_answering(TEACHER, device="cpu")


@pytest.fixture(scope="module")
def picture(scenes_dir, tmp_path_factory):
    """A scene as a file."""
    from mmkd.data.records import Records
    from mmkd.recipe import DataConfig

    records = Records(DataConfig(train=str(scenes_dir / "validation.parquet")))
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    records.pictures(records[0])[0].save(path)
    return str(path)


def run(monkeypatch, capsys, *words, typed=None):
    """Exit status, stdout and stderr of `mmkd chat` in this process."""
    monkeypatch.setattr(sys, "argv", ["mmkd", "chat", *map(str, words)])
    if typed is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def by_hand(model, processor, turns, pictures):
    """The likeliest answer by transformers alone."""
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert pictures == inputs["pixel_values"].shape[0]
    ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def turn(role, text, *pictures):
    shown = [{"type": "image", "path": p} for p in pictures]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def test_a_conversation_gives_the_answers_of_transformers(teacher, picture):
    conversation = Conversation(*teacher)
    first = conversation.ask(ASK, [picture])
    turns = [turn("user", ASK, picture)]
    assert first.text == by_hand(*teacher, turns, 1).strip()
    assert first.finished
    assert first.tokens == len(teacher[1].tokenizer(first.text)["input_ids"]) + 1  # its end
    assert first.seconds > 0
    second = conversation.ask("Is there a cat in it?", [Image.open(picture)])
    turns += [turn("assistant", first.text), turn("user", "Is there a cat in it?", picture)]
    turns[-1]["content"][0] = {"type": "image", "path": picture}
    assert second.text == by_hand(*teacher, turns, 2).strip()


def test_pieces_are_the_answer(teacher, picture):
    pieces = []
    reply = Conversation(*teacher).ask(ASK, [picture], on_text=pieces.append)
    assert "".join(pieces).strip() == reply.text
    assert len(pieces) > 1


def test_sampled_answers_depend_on_the_seed_and_leave_the_random_state(teacher, picture):
    hot = SamplingConfig(temperature=5.0, max_new_tokens=12)
    state = torch.random.get_rng_state()
    texts = [Conversation(*teacher, sampling=hot, seed=s).ask(ASK, [picture]) for s in (1, 1, 2)]
    assert texts[0].text == texts[1].text != texts[2].text
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(teacher, picture, tmp_path):
    conversation = Conversation(*teacher)
    conversation.ask(ASK, [picture])
    before = conversation.record
    (tmp_path / "text.png").write_text("no image")
    for bad in (tmp_path / "none.png", tmp_path / "text.png"):
        with pytest.raises(DataError, match=bad.name):
            conversation.ask(ASK, [bad])
        assert conversation.record is before


def test_one_question(monkeypatch, capsys, picture):
    status, out, err = run(monkeypatch, capsys, TEACHER, ASK, "--image", picture)
    assert (status, err) == (0, "")
    answer, facts = out.splitlines()
    assert " card" in answer
    assert facts.endswith(" tokens/s")


def test_a_cut_answer_is_named(monkeypatch, capsys, picture):
    words = (TEACHER, ASK, "--image", picture, "--max-new-tokens", 3)
    _, out, _ = run(monkeypatch, capsys, *words)
    assert "3 tokens, " in out
    assert out.endswith(", cut off by --max-new-tokens\n")


def test_two_models_side_by_side(monkeypatch, capsys, picture, tiny_model_dir):
    words = (tiny_model_dir, ASK, "--image", picture, "--compare", TEACHER, "--max-new-tokens", 40)
    _, out, _ = run(monkeypatch, capsys, *words)
    assert f"{tiny_model_dir}: " in out
    assert f"{TEACHER}: " in out
    assert out.count(" tokens/s") == 2


def test_a_revision_is_one_of_the_first_model(monkeypatch, capsys, picture, teacher):
    loaded = []

    def load(name, **settings):
        loaded.append((name, settings["revision"]))
        return teacher

    monkeypatch.setattr(chat_module, "load_answering", load)
    words = (TEACHER, ASK, "--image", picture, "--compare", "another", "--revision", "v2")
    assert run(monkeypatch, capsys, *words)[0] == 0
    assert loaded == [(TEACHER, "v2"), ("another", None)]


def test_as_json_stdout_is_json_alone(monkeypatch, capsys, picture):
    _, out, _ = run(monkeypatch, capsys, TEACHER, ASK, "--image", picture, "--json")
    reply = json.loads(out)[TEACHER]
    assert reply["finished"] is True
    assert reply["tokens_per_second"] == pytest.approx(reply["tokens"] / reply["seconds"])


def test_a_conversation_in_the_terminal(monkeypatch, capsys, picture):
    typed = f"/image {picture}\n{ASK}\n/image none.png\nAnd now?\n\n/new\n/what\n/quit\nnot asked\n"
    status, out, _ = run(monkeypatch, capsys, TEACHER, typed=typed)
    assert status == 0
    lines = out.splitlines()
    assert " card" in lines[0]
    assert lines[1].endswith(" tokens/s")
    assert lines[2:] == ["mmkd: none.png: no such image -- check the path", chat_module.HELP]


def test_a_picture_of_the_command_comes_with_the_first_question(
    monkeypatch, capsys, picture, teacher
):
    typed = "Is there a cat?\nIs there a dog?\n"
    _, out, _ = run(monkeypatch, capsys, TEACHER, "--image", picture, typed=typed)
    conversation = Conversation(*teacher)
    said = [conversation.ask("Is there a cat?", [picture]), conversation.ask("Is there a dog?")]
    assert out.splitlines()[::2] == [reply.text for reply in said]


def test_control_characters_of_an_answer_are_escaped(capsys):
    chat_module._write("red\x1b[2Jgreen\nblue")
    assert capsys.readouterr().out == "red\\x1b[2Jgreen\nblue"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing", "?"], "nothing: no such model folder -- "),
        ([TEACHER, "?", "--student", "kd"], "not a run's folder, and --student names a student"),
        ([TEACHER, "--json"], "--json prints one answer -- add a question to the command"),
        ([TEACHER, "?", "--image", "none.png"], "none.png: no such image -- check the path"),
        ([TEACHER, "?", "--temperature", "1e-9"], "temperature: got 1e-09, which is too"),
        ([TEACHER, "?", "--compare", "nothing"], "nothing: no such model folder -- "),
        ([TEACHER, "?", "--compare", TEACHER], "--compare: it is the model itself -- name another"),
    ],
)
def test_a_command_that_is_wrong_is_one_line(monkeypatch, capsys, words, message):
    status, _, err = run(monkeypatch, capsys, *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_run_with_several_students_asks_for_one(monkeypatch, capsys, run_dir):
    status, _, err = run(monkeypatch, capsys, run_dir, "?")
    assert status == 2
    assert " finished students -- choose one with --student: " in err


def test_a_pipe_that_is_no_text_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "mmkd.cli", "chat", TEACHER],
        input=b"\xff\xfe\n",
        capture_output=True,
        env={"PATH": "", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.decode() == "mmkd: standard input: it is not UTF-8 -- send UTF-8\n"
