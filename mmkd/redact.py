"""Finds and removes tokens, keys and passwords in text.

A secret is recognized by its form, or because an environment variable of this machine holds it.

    redact("hf_abc... of https://me:word@host/x")  # "hf_... of https://host/x"
"""

import os
import re
from typing import Any

KINDS = {
    "Hugging Face": r"(?:hf_|api_org_)[A-Za-z0-9]{20,}",
    "Anthropic": r"sk-ant-[A-Za-z0-9_-]{20,}",
    "OpenAI": r"sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
    "GitHub": r"(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "GitLab": r"gl(?:pat|ptt|rt|dt|cbt|soat)-[A-Za-z0-9_.-]{18,}",
    "Slack": r"xox[abeoprs]-[A-Za-z0-9-]{10,}",
    "AWS": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",
    "Google": r"(?:AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,})",
    "Weights & Biases": r"wandb_v\d_[A-Za-z0-9_-]{20,}",
    "Stripe": r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}",
    "PyPI": r"pypi-[A-Za-z0-9_-]{30,}",
    "npm": r"npm_[A-Za-z0-9]{30,}",
    "Replicate": r"r8_[A-Za-z0-9]{30,}",
    "Groq": r"gsk_[A-Za-z0-9]{30,}",
    "NVIDIA": r"nvapi-[A-Za-z0-9_-]{30,}",
    "xAI": r"xai-[A-Za-z0-9]{30,}",
    "Perplexity": r"pplx-[A-Za-z0-9]{30,}",
    "Fireworks": r"fw_[A-Za-z0-9]{20,}",
    "Databricks": r"dapi[a-f0-9]{32}",
    "DigitalOcean": r"do[opr]_v1_[a-f0-9]{40,}",
    "Docker": r"dckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}",
    "SendGrid": r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "Vault": r"hv[sbr]\.[A-Za-z0-9_-]{20,}",
    "Grafana": r"gl(?:sa|c)_[A-Za-z0-9+/=_]{30,}",
    "Notion": r"ntn_[A-Za-z0-9]{30,}",
    "Linear": r"lin_api_[A-Za-z0-9]{30,}",
    "JSON Web Token": r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s]*",
}
"""Regular expressions of secrets, by the service that issues them."""

_EDGE = r"(?<![A-Za-z0-9_])"
_ANY = re.compile(f"{_EDGE}(?:{'|'.join(KINDS.values())})")
_LOGIN = re.compile(r"(?<=://)[^/\s?#'\"]+@")  # name:p@ssword@ of an address
_NAMED = re.compile(
    r"(?P<name>(?<![A-Za-z0-9])(?:access[_-]?token|auth[_-]?token|api[_-]?token|[a-z]*api[_-]?key|"
    r"access[_-]?key(?:[_-]?id)?|client[_-]?secret|secret(?:[_-]?key)?|password|passwd|"
    r"hf[_-]token|x-amz-signature|x-amz-credential|x-amz-security-token|signature|sig|"
    r"(?<=[?&;-])token)[\"']?\s*(?:=|:\s)\s*[\"']?(?:bearer\s+)?|authorization:\s*\w+\s+)"
    r"(?P<value>[^\s\"'&;,\[\]{}<>|.…][^\s\"'&;,\[\]{}<>|]{7,})",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY(_ID)?|SECRET_?KEY|CREDENTIALS?)$"
)
LEAST = 12
"""Fewest characters of a variable's value that counts as a secret. Shorter values occur in ordinary
text."""


def redact(text: str) -> str:
    """The text with each secret replaced by its first characters and three dots."""
    for value in _of_this_machine():
        text = text.replace(value, "...")
    text = _ANY.sub(lambda found: found[0][: _shown(found[0])] + "...", text)
    if "://" in text:
        text = _LOGIN.sub("", text)
    if "=" in text or ":" in text:
        text = _NAMED.sub(lambda found: found["name"] + "...", text)
    return text


def redact_all(value: Any) -> Any:
    """The value with `redact` applied to every text in its lists and mappings, keys included."""
    if isinstance(value, dict):
        return {redact_all(key): _redact_item(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _redact_item(key: Any, value: Any) -> Any:
    """The value of a key, which may say by its name that the value is a secret."""
    return "..." if _is_named_secret(key, value) else redact_all(value)


def _is_named_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and _NAMED.fullmatch(f"{key}={value}") is not None


def find_secret(text: str, *, named: bool = True) -> str | None:
    """A description of the first secret in a text, such as "a token (GitHub)", or None.

    Args:
        text: the text to search.
        named: also search for `password=...` and similar. Set it to False for programs and
            tokenizers, which contain such text without secrets.
    """
    if any(value in text for value in _of_this_machine()):
        return "a secret of this machine's environment"
    if (any_kind := _ANY.search(text)) is not None:
        kind = next(k for k, form in KINDS.items() if re.fullmatch(form, any_kind[0]))
        return "a private key" if kind == "private key" else f"a token ({kind})"
    if "://" in text and (found := _LOGIN.search(text)) and ":" in found[0]:
        return "the login of an address"
    if named and ("=" in text or ":" in text) and _NAMED.search(text):
        return "a password or a key"
    return None


def find_secret_within(value: Any) -> tuple[str, str] | None:
    """The dotted key and the description of the first secret in nested lists and mappings.

    Returns:
        (key, description), or None if there is no secret. The key is "" for a plain text.
    """
    if isinstance(value, dict):
        pairs = [(str(key), item) for key, item in value.items()]
        for key, _ in pairs:
            if (what := find_secret(key)) is not None:
                return redact(key), what
        for key, item in pairs:
            if _is_named_secret(key, item):
                return key, "a password or a key"
    elif isinstance(value, list | tuple):
        pairs = [(str(index), item) for index, item in enumerate(value)]
    else:
        what = find_secret(value) if isinstance(value, str) else None
        return None if what is None else ("", what)
    for key, item in pairs:
        if (found := find_secret_within(item)) is not None:
            return (f"{key}.{found[0]}" if found[0] else key), found[1]
    return None


def _shown(secret: str) -> int:
    """The number of first characters that show the kind of a secret and nothing else."""
    if secret.startswith("-----"):
        return 10
    end = max(secret.rfind(mark, 0, 12) for mark in "_-.")
    return end + 1 if end >= 0 else 4


def _of_this_machine() -> list[str]:
    """Values of environment variables with the names of secrets, and the `hf auth login` token."""
    found = [v for k, v in os.environ.items() if _SECRET_VARIABLE.search(k.upper())]
    found.append(_stored_token())
    plain = (v.strip() for v in found)
    # CREDENTIALS often names a file; AWS's keys have slashes inside.
    return [
        v
        for v in plain
        if len(v) >= LEAST and not v.isalpha() and not v.startswith(("/", "~", "."))
    ]


def _stored_token() -> str:
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "token"
    )
    if path not in _stored:
        try:
            with open(path, encoding="utf-8") as file:
                _stored[path] = file.read()
        except (OSError, UnicodeDecodeError):
            _stored[path] = ""
    return _stored[path]


_stored: dict[str, str] = {}
