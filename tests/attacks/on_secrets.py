"""Recipes, commands and folders that contain a secret, which must not be published."""

import json
from pathlib import Path

from tests.attacks.table import add, attack, by_recipe

THEME = "secrets"
TOKENS = {
    "hugging_face": "hf_" + "a1" * 17,
    "anthropic": "sk-ant-" + "a1B2" * 8,
    "openai": "sk-proj-" + "a1B2" * 8,
    "github": "ghp_" + "a1B2" * 9,
    "github_fine": "github_pat_" + "a1B2" * 10,
    "gitlab": "glpat-" + "a1B2" * 5,
    "slack": "xoxb-" + "1234567890-abcdef",
    "aws": "AKIA" + "ABCD1234" * 2,
    "google": "AIza" + "a1B2c" * 7,
    "wandb": "wandb_v1_" + "a1B2" * 8,
    "stripe": "sk_live_" + "a1B2" * 6,
    "pypi": "pypi-" + "a1B2" * 10,
    "npm": "npm_" + "a1B2" * 9,
    "databricks": "dapi" + "0a1b" * 8,
    "web_token": ".".join(["eyJ" + "hbGciOiJI", "eyJ" + "zdWIiOiIx", "a1B2" * 5]),
    "private_key": "-----BEGIN RSA " + "PRIVATE KEY-----",
}
SEEMS = "it seems to be "


for name, token in TOKENS.items():
    keys = {"release": {"tags": [f"x {token}"]}}
    did = f"put a token into the tags ({name})"
    by_recipe(THEME, f"tag_with_a_token_{name}", did, keys, "release.tags.0", SEEMS)


@attack(THEME, "typed a token as `key=value`", "student.revision", SEEMS + "a token (GitHub)")
def override_with_a_token(world):
    return ["run", "recipe.yaml", f"student.revision={TOKENS['github']}"]


@attack(THEME, "typed a token as a key", SEEMS + "a token")
def key_with_a_token(world):
    return ["plan", "recipe.yaml", f"{TOKENS['github']}=1"]


@attack(THEME, "put a login into an address", "data.train", SEEMS + "the login of an address")
def address_with_a_login(world):
    world.raw["data"] = {"train": "https://me:word@host/records.json"}


@attack(THEME, "put a token into an address", "data.train", SEEMS + "a password or a key")
def address_with_a_token(world):
    world.raw["data"] = {"train": "https://host/records.json?token=abcdefgh12345"}


@attack(THEME, "put a variable's value into a recipe", SEEMS + "a secret of this machine")
def value_of_a_variable(world):
    world.patch.setenv("SOME_API_KEY", "0123456789abcdef0123456789abcdef")
    world.raw["label"] = "x0123456789abcdef0123456789abcdef"


@attack(THEME, "put the value of a variable with slashes into a recipe", SEEMS + "a secret of this")
def value_with_slashes(world):
    world.patch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfi0123456789")
    world.raw["data"] = {"train": "x/wJalrXUtnFEMI/K7MDENG/bPxRfi0123456789"}


@attack(THEME, "named a value as a password", "config.password", SEEMS + "a password or a key")
def value_of_a_named_key(world):
    world.raw["student"] = {"config": {"model_type": "llava", "password": "correct-horse"}}


@attack(THEME, "put an @ into a login", "data.train", SEEMS + "the login of an address")
def login_with_an_at(world):
    world.raw["data"] = {"train": "https://me:wo@rd@host/records.json"}


def released(world):
    """A finished run, and the command that releases it."""
    world.take(world.given.trained, "runs")
    (student,) = Path("runs/tiny").glob("*/student")
    return student, ["release", "runs/tiny", "--out", "released"]


PUBLISHES = "and a release publishes it"


@attack(THEME, "left a token in a student's folder", "notes.txt seems to hold", PUBLISHES)
def token_in_a_students_folder(world):
    student, words = released(world)
    (student / "notes.txt").write_text(f"login with {TOKENS['hugging_face']}")
    return words


@attack(THEME, "left a token in a tokenizer's file", "tokenizer_config.json seems to", PUBLISHES)
def token_in_a_tokenizer(world):
    student, words = released(world)
    path = student / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": TOKENS["openai"]}))
    return words


@attack(THEME, "left a token in the header of weights", "extra.safetensors seems", PUBLISHES)
def token_in_weights(world):
    import torch
    from safetensors.torch import save_file

    student, words = released(world)
    facts = {"by": TOKENS["gitlab"]}
    save_file({"x": torch.ones(1)}, student / "extra.safetensors", metadata=facts)
    return [*words, "--dry-run"]


@attack(THEME, "named a file by a token", "seems to hold a token (npm)", PUBLISHES)
def token_as_a_files_name(world):
    student, words = released(world)
    (student / TOKENS["npm"]).write_text("x")
    return words


def hidden(name, did, file, content, seems="seems to hold a token"):
    def prepare(world):
        student, words = released(world)
        (student / file).write_bytes(content)
        return words

    prepare.__name__ = name
    attack(THEME, did, f"{file} {seems}", PUBLISHES)(prepare)


TOKEN = TOKENS["hugging_face"]
hidden("token_in_utf16", "left a token in UTF-16", "notes.txt", TOKEN.encode("utf-16"))
hidden("token_in_utf32", "left a token in UTF-32", "notes.txt", TOKEN.encode("utf-32-be"))
hidden(
    *("token_that_is_escaped", "left a token with an escaped character", "notes.json"),
    json.dumps({"a": TOKEN}).replace("f_", "\\u0066\\u005F").encode(),
)
hidden(
    *("password_in_a_hidden_file", "left a password in a hidden file", ".env"),
    b"DB_PASSWORD=correct-horse",
    "seems to hold a password or a key",
)


@attack(THEME, "linked a private file into a student's folder", "id is a link to a file outside")
def link_out_of_a_students_folder(world):
    student, words = released(world)
    Path("private").write_text("mine")
    (student / "id").symlink_to(Path("private").resolve())
    return words


@attack(THEME, "set a token for the release", "release: tags.0", SEEMS + "a token (AWS)")
def token_in_a_releases_settings(world):
    _, words = released(world)
    return [*words, f"tags=[{TOKENS['aws']}]"]


def fields(name, setting, key, wanted):
    """An attack by a setting of a release."""
    did, parts = f"released with `{setting}`", (f"release: {key}: ", f" -- {wanted}")
    add("cards", name, did, parts, lambda world: [*released(world)[1], setting])


NAMES, LINKS = "use letters A-Z", "give an address that begins with https://"
fields("license_with_html", "license=<script>", "license", "give the Hub's name of a license")
fields("license_name_with_a_link", "license_name='[x](http://evil)'", "license_name", NAMES)
fields("license_link_to_a_script", "license_link='javascript:alert(1)'", "license_link", LINKS)
fields("license_link_that_ends", "license_link='http://x) ![](http://evil'", "license_link", LINKS)
fields("data_set_with_a_link", "datasets=['me/x](http://evil)']", "datasets.0", "give a Hub id")
fields("language_with_html", "language=['<b>']", "language.0", "give an ISO 639 code")


@attack(THEME, "wrote other weights under old scores", "its scores are of other weights")
def scores_of_other_weights(world):
    student, words = released(world)
    folder = Path("runs/tiny/evaluation/student")
    folder.mkdir(parents=True, exist_ok=True)
    scores = {"scenes_pope": {"pope_accuracy": 0.99}}
    facts = {"scores": scores, "model": str(student), "parameters": 1, "weights_bytes": 1}
    (folder / "results.json").write_text(json.dumps(facts))
    (folder / "request.json").write_text(json.dumps({"weights": "0" * 64}))
    return words
