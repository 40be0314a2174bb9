"""`mmkd release` against a server on this machine that fails on purpose; what arrives loads where
mmkd is not installed and says the same."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise

import huggingface_hub
import pytest
import torch
from PIL import Image, ImageDraw

from mmkd.cli import main
from mmkd.errors import HubError
from mmkd.modeling.loading import load_pretrained, load_pretrained_processor
from mmkd.recipe import ReleaseConfig, load_recipe
from mmkd.release import release
from mmkd.release.upload import AGAIN, TRIES, attempt, upload
from mmkd.runs import pipeline
from mmkd.students import write
from tests.support import families, hub_server
from tests.support.hub_server import TOKEN
from tests.support.recipes import tiny_recipe
from tests.support.slow import only

STUDENTS = {
    "dense": [],
    "sparse hybrid": [
        {"kind": "mamba", "keep_attention": [0]},
        {"kind": "moe", "layers": [1], "experts": 2, "top_k": 1},
    ],
}
REPO = "me/student"


@pytest.fixture(scope="module")
def trained(scenes_dir, tiny_model_dir, tmp_path_factory):
    """Runs by the student's name; its weights lie in several files."""

    @cache
    def run(name):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path_factory.mktemp("runs"),
            stage={"steps": 2},
            student={"model": str(tiny_model_dir), "convert": STUDENTS[name]},
            release={"repo": REPO, "license": "mit"},
            evaluate={
                "tasks": ["scenes_pope"], "include": str(scenes_dir / "tasks"), "batch_size": 1
            },
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "SHARD_SIZE", "100KB")
            return pipeline.run(load_recipe(raw))

    return run


@pytest.fixture
def hub(monkeypatch):
    with hub_server.in_place(monkeypatch) as hub:
        yield hub


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were to be waited; nobody waits."""
    asked = []
    monkeypatch.setattr("time.sleep", asked.append)
    return asked


@pytest.fixture
def folder(tmp_path):
    """A release in the small: two weight files and a card."""
    made = tmp_path / "release"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n\n# student\n")
    for number in (1, 2):
        (made / f"model-{number:05d}-of-00002.safetensors").write_bytes(bytes([number]) * 50_000)
    return made


SETTINGS = ReleaseConfig(repo=REPO)


def contents(folder):
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def command(hub, *words, **environment):
    """`mmkd release` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mmkd.cli", "release", *map(str, words)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN,
             **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((10, 20, 50, 60), fill="red")
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


ALONE = """
import json, sys
sys.modules["mmkd"] = sys.modules["mmkd_models"] = None
exec(open(sys.argv[1]).read())
print(json.dumps(output.tolist()))
print([m for m in sys.modules if m.split(".")[0] in ("mmkd", "mmkd_models") and sys.modules[m]])
"""


ALL_QUESTIONS = """
import io
import pyarrow.parquet
from PIL import Image

output = []
for asked in pyarrow.parquet.read_table(sys.argv[2]).to_pylist():
    content[0] = {"type": "image", "image": Image.open(io.BytesIO(asked["image"]["bytes"]))}
    content[1]["text"] = asked["question"]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    said = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    output.append(processor.decode(said, skip_special_tokens=True))
print(json.dumps(output))
"""


def answer_of(student, picture):
    """The tokens that the student says to the card's question, with mmkd."""
    processor, model = load_pretrained_processor(str(student)), load_pretrained(str(student))
    question = [
        {"type": "image", "path": str(picture)},
        {"type": "text", "text": "What is in the image?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=64).tolist()


@pytest.mark.parametrize("student", only(["sparse hybrid"], STUDENTS))
def test_what_arrives_says_the_same_without_mmkd(student, trained, hub, tmp_path, picture):
    """The card's own lines, word for word: by the name on the Hub, and from a downloaded folder."""
    run = trained(student)
    release(run)
    got = hub.download(REPO, tmp_path / "downloaded")
    assert contents(got) == contents(run / "release" / "student")
    assert len(list(got.glob("model-*.safetensors"))) > 1
    settings = json.loads((got / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 2]  # the tokenizer's, which the model knew nothing of
    assert settings["pad_token_id"] == 0
    needs_code = student != "dense"
    assert bool(list(got.glob("*.py"))) == needs_code
    lines = re.search(r"```python\n(.*?)```", (got / "README.md").read_text(), re.S)[1]
    assert ("trust_remote_code=True" in lines) == needs_code
    want = answer_of(run / "01-mimic" / "student", picture)
    assert len(want[0]) > 64  # and no empty answer

    script = tmp_path / "use.py"
    script.write_text(lines.replace(f'"{REPO}"', repr(str(got))))
    *_, said, modules = families.run_alone(ALONE, tmp_path, script).splitlines()
    assert (json.loads(said), modules) == (want, "[]")

    script.write_text(lines)
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    *_, said, modules = families.run_alone(ALONE, tmp_path, script, **online).splitlines()
    assert (json.loads(said), modules) == (want, "[]")


@pytest.mark.parametrize("student", only(["sparse hybrid"], STUDENTS))
def test_it_answers_every_question_as_it_was_scored(
    student, trained, scenes_dir, tmp_path, picture
):
    """Where mmkd cannot be imported; alike answers are alike scores."""
    run, out = trained(student), tmp_path / "released"
    release(run, out=out)
    script = tmp_path / "use.py"
    lines = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)[1]
    script.write_text(lines.replace(f'"{REPO}"', repr(str(out))))
    questions = scenes_dir / "eval" / "pope.parquet"
    said = families.run_alone(ALONE + ALL_QUESTIONS, tmp_path, script, questions)
    samples = run / "evaluation" / "student" / "samples" / "scenes_pope.jsonl"
    scored = [json.loads(line)["prediction"] for line in samples.read_text().splitlines()]
    assert len(scored) > 30
    assert len(set(scored)) > 10
    assert json.loads(said.splitlines()[-1]) == scored


def test_an_unwell_hub_is_asked_again(folder, hub, waits, capsys):
    hub.fail("POST /api/repos/create", 503, times=2)
    hub.fail("POST /api/validate-yaml", 502)
    hub.fail("preupload", 429)
    hub.fail("PUT /lfs", "drop", times=2)
    hub.fail("PUT /lfs", 500)
    hub.fail("/commit/main", 503, times=2)
    assert upload(folder, SETTINGS) == f"{hub.url}/{REPO}"
    assert contents(folder) == hub.repos[REPO].files
    assert hub.repos[REPO].commits == 1
    assert all(fault.times == 0 for fault in hub.faults)
    said = capsys.readouterr().out
    assert f"{REPO}: 503 on purpose; trying again in 2 s (2 of {TRIES})" in said
    assert f"{REPO}: 503 on purpose; trying again in 4 s (3 of {TRIES})" in said


def test_a_hub_that_stays_unwell_ends_in_one_line(folder, hub, waits):
    hub.fail("POST /api/repos/create", 503, times=99)
    with pytest.raises(HubError) as caught:
        upload(folder, SETTINGS)
    assert str(caught.value) == (
        f"{hub.url}/{REPO}: cannot create the repository (503 on purpose) -- {AGAIN}"
    )
    assert hub.count("POST /api/repos/create") == TRIES
    assert len(waits) == TRIES - 1
    assert all(later == 2 * earlier for earlier, later in pairwise(waits))


def test_nobody_there(folder, hub, waits, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9.*Connection refused.*same command again"):
        upload(folder, SETTINGS)


@pytest.mark.parametrize(
    ("request_", "status", "hint"),
    [
        ("POST /api/repos/create", 401, "log in with 'hf auth login'"),
        ("POST /api/repos/create", 403, "a token that may write"),
        ("preupload", 401, "log in"),
        ("preupload", 404, "check the repository's name"),
        ("/commit/main", 403, "a token that may write"),
        ("PUT /lfs", 403, "a token that may write"),
    ],
)
def test_a_refusal_is_not_asked_again(folder, hub, waits, request_, status, hint):
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.fail(request_, status, times=99)
    with pytest.raises(HubError, match=rf"{hub.url}/{REPO}: cannot .*{status}.* -- .*{hint}"):
        upload(folder, SETTINGS)
    assert hub.count(request_) == 1
    assert waits == []


def test_a_wrong_token_is_one_line(folder, hub, waits, monkeypatch):
    wrong = "hf_" + "b" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(HubError, match=r"401 Invalid username or password.* -- log in") as caught:
        upload(folder, SETTINGS)
    assert wrong not in str(caught.value)


@pytest.mark.parametrize("status", [401, 503])
def test_what_xet_says_of_the_hub(status):
    """Its errors are of one type, with the answer in their text, as hf_xet 1.8 was seen to raise
    them."""
    tried = []

    def call():
        tried.append(1)
        kind = "server" if status >= 500 else "client"
        raise ConnectionError(f"Request error: HTTP status {kind} error ({status} Any), domain: x")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: None)
        with pytest.raises(HubError, match=str(status)):
            attempt(REPO, "upload", call)
    assert len(tried) == (TRIES if status == 503 else 1)


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError):
        attempt(REPO, "upload", lambda: 1 // 0)


def test_an_upload_that_broke_off_goes_on(folder, hub, waits):
    """Large files that arrived before the end are not sent again, though no commit has them."""
    hub.fail("PUT /lfs", 500, times=999)
    with pytest.raises(HubError, match="same command again"):
        upload(folder, SETTINGS)
    assert not hub.objects
    hub.faults.clear()
    hub.fail("/commit/main", 500, times=999)
    hub.requests.clear()
    with pytest.raises(HubError, match="same command again"):
        upload(folder, SETTINGS)
    assert hub.count("PUT /lfs") == len(hub.objects) == 2
    assert hub.repos[REPO].files == {}
    hub.faults.clear()
    hub.requests.clear()
    upload(folder, SETTINGS)
    assert hub.count("PUT /lfs") == 0
    assert hub.repos[REPO].files == contents(folder)


def test_a_killed_release_sends_what_is_missing(trained, hub):
    run = trained("dense")
    files = list((run / "01-mimic" / "student").glob("*.safetensors"))
    hub.fail("PUT /lfs", "hang")
    words = (run, "--repo", "me/killed")
    process = command(hub, *words, HF_HUB_DISABLE_XET="1")
    deadline = time.monotonic() + 120
    while len(hub.objects) < len(files) - 1:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.requests.clear()
    process = command(hub, *words, HF_HUB_DISABLE_XET="1")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"released: {hub.url}/me/killed" in said
    assert TOKEN not in said
    assert hub.count("PUT /lfs") == 1
    assert hub.repos["me/killed"].files == contents(run / "release" / "student")


def test_what_the_hub_has_is_not_sent_again(folder, hub):
    upload(folder, SETTINGS)
    hub.requests.clear()
    upload(folder, SETTINGS)
    assert hub.count("PUT /lfs") == hub.count("/commit/main") == 0
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# another\n")
    upload(folder, SETTINGS)
    assert hub.count("PUT /lfs") == 0
    assert hub.repos[REPO].commits == 2
    assert hub.repos[REPO].files == contents(folder)


def test_older_weights_do_not_stay(folder, hub):
    upload(folder, SETTINGS)
    hub.repos[REPO].files |= {"notes.md": b"by hand", "onnx/model.safetensors": b"by hand"}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(b"new")
    upload(folder, SETTINGS)
    assert sorted(hub.repos[REPO].files) == [
        "README.md", "model.safetensors", "notes.md", "onnx/model.safetensors"
    ]  # fmt: skip


def test_private(folder, hub):
    upload(folder, ReleaseConfig(repo="me/hidden", private=True))
    assert hub.repos["me/hidden"].private
    upload(folder, SETTINGS)
    assert not hub.repos[REPO].private
    with pytest.raises(HubError, match="there already, and public"):
        upload(folder, ReleaseConfig(repo=REPO, private=True))


def test_a_card_that_the_hub_refuses(folder, hub):
    (folder / "README.md").write_text("---\nlicense: none-of-these\n---\n")
    with pytest.raises(HubError, match=r"refuses the card's metadata .*of them.*correct license"):
        upload(folder, SETTINGS)
    assert hub.repos == {}


def test_offline_and_logged_out(trained, hub, monkeypatch, tmp_path, capsys):
    run = trained("dense")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["mmkd", "release", str(run)])
    for offline, words in ((False, "nobody is logged in"), (True, "while HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert hub.requests == []


def test_the_protocol_that_users_get(trained, hub, tmp_path):
    """Not LFS but xet, into hf_xet's own store on this disk: what broke off goes on, and nothing is
    sent twice."""
    run = trained("sparse hybrid")
    hub.xet = tmp_path / "store"
    files = contents(run / "01-mimic" / "student")
    weights = sum(len(c) for name, c in files.items() if name.endswith(".safetensors"))
    hub.fail("/commit/main", 403, times=99)
    for status, commits in ((2, 0), (0, 1), (0, 1)):
        process = command(hub, run, "--repo", "me/xet", HF_HOME=str(tmp_path / "home"))
        said, _ = process.communicate(timeout=120)
        assert process.returncode == status, said
        assert hub.repos["me/xet"].commits == commits
        stored = sum(p.stat().st_size for p in hub.xet.rglob("default.*"))
        assert weights / 2 < stored < 1.5 * weights
        hub.faults.clear()
    assert hub.count("PUT /lfs") == 0
    assert hub.repos["me/xet"].files.keys() == contents(run / "release" / "student").keys()
