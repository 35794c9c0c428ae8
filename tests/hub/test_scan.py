"""What the scan of a push finds in a text, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.artifact.scan import list_paths, scan_file, shorten_paths

# Put together here, so that no file of the project looks as if it held one.
SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 8,
    "an AWS key": "AKIA" + "Q7" * 8,
    "a GitHub token": "ghp_" + "x9" * 18,
    "a GitLab token": "glpat-" + "x9Y-" * 5,
    "a Google key": "AIza" + "Sy-x9" * 7,
    "an Azure key": "AccountKey=" + "x9+/" * 21 + "==",
    "a Slack token": "xoxb-" + "123456789012-" * 2 + "aB3" * 8,
    "a Stripe key": "sk_live_" + "aB3" * 8,
    "a SendGrid key": "SG." + "aB" * 11 + "." + "x9_" * 14 + "x",
    "a Telegram token": "123456789:" + "AA" + "x9-" * 11,
    "a signed web token": "eyJ" + "hbGciOi9" * 3 + ".eyJ" + "zdWIiOi9" * 3 + "." + "x9_-" * 8,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a password in an address": "https://ann:" + "s3cret@example.org/x",
}
PROVIDERS = [
    "sk-proj-" + "aB3_-" * 24,
    "sk-ant-" + "api03-" + "aB3_-" * 18,
    "sk-" + "aB3" * 16,
    "gsk_" + "aB3x" * 13,
]
REGISTRIES = ["npm_" + "aB3" * 12, "pypi-" + "AgEIcHlwaS5vcmc" + "x9-_" * 20, "dckr_pat_" + "x9_" * 9]


def scan(tmp_path: Path, text: str, name: str = "notes.txt") -> list[str]:
    path = tmp_path / name
    path.write_text(text)
    return scan_file(name, path, [str(tmp_path)])


@pytest.mark.parametrize("what", SECRETS)
def test_a_secret_is_named_and_not_repeated(tmp_path: Path, what: str) -> None:
    (problem,) = scan(tmp_path, f"first\nsee {SECRETS[what]} there")
    assert problem.startswith(f"notes.txt, line 2: must hold no secret, got {what}. Take it out, and make a new one")
    assert SECRETS[what] not in problem


@pytest.mark.parametrize(
    ("what", "secret"),
    [
        *(("the key of a language model's provider", key) for key in PROVIDERS),
        *(("a token of a package registry", token) for token in REGISTRIES),
        ("a Slack token", "https://hooks.slack.com/services/" + "T0123ABCD/" + "B0123ABCD/" + "aB3" * 8),
    ],
)
def test_several_forms_of_one_kind(tmp_path: Path, what: str, secret: str) -> None:
    (problem,) = scan(tmp_path, f"key={secret}")
    assert f"got {what}." in problem


@pytest.mark.parametrize("what", SECRETS)
def test_a_secret_behind_an_end_of_line_in_json(tmp_path: Path, what: str) -> None:
    assert f"got {what}." in scan(tmp_path, json.dumps({"text": f"ours:\n{SECRETS[what]}"}), "finetune.json")[0]


def test_the_value_of_a_variable_that_is_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_API_KEY", "plain-words-here")
    monkeypatch.setenv("SHORT_TOKEN", "the")  # any text has it
    (problem,) = scan(tmp_path, "the plain-words-here")
    assert "got the value of $SHOP_API_KEY" in problem


@pytest.mark.parametrize(
    "path", ["/home/ann/rows.csv", "/Users/ann/rows.csv", "/root/rows.csv", r"C:\Users\ann\rows.csv"]
)
def test_a_path_of_somebody_is_found(tmp_path: Path, path: str) -> None:
    (problem,) = scan(tmp_path, f'{{"data": "{path}"}}')
    assert problem == (
        f"notes.txt, line 1: must hold no path of this machine, got {path}. Write a relative path, or a name."
    )


def test_weights_are_read_up_to_the_end_of_their_header(tmp_path: Path) -> None:
    header = b'{"__metadata__": {"made": "/home/ann/x"}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "got /home/ann/x" in scan_file(path.name, path)[0]
    path.write_bytes((2).to_bytes(8, "little") + b"{}/home/ann/x")
    assert scan_file(path.name, path) == []


def test_words_that_begin_like_a_secret_are_left_alone(tmp_path: Path) -> None:
    text = (
        "risk-adjusted-return-of-the-whole-portfolio sk-learn-based npm_config_registry SG.x eyJ.eyJ. glpat- AIza xoxo-"
    )
    assert scan(tmp_path, text) == []


def test_words_of_a_tokenizer_are_left_alone(tmp_path: Path) -> None:
    text = (
        '{"/home": 1, "/root": 2, "hf_": 3, "https://a.b/c": 4, "ann@example.org": 5, "10:30@noon": 6, "~/rows.csv": 7}'
    )
    assert scan(tmp_path, text, "tokenizer.json") == []


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("data: /srv/sets/rows.csv", "data: rows.csv"),
        (r"data: D:\sets\rows.csv", "data: rows.csv"),
        ("data: ../sets/rows.csv", "data: ../sets/rows.csv"),
        ("base: acme/tiny # https://a.org/b/c", "base: acme/tiny # https://a.org/b/c"),
        ("data: /srv/our sets/rows of may.csv # all", 'data: "rows of may.csv" # all'),
        (r"data: \\server\share\rows.csv", "data: rows.csv"),
        ("data: file:///srv/sets/rows.csv", "data: rows.csv"),
        (r'model: {base: "D:\\our sets\\tiny", max_length: 8}', 'model: {base: "tiny", max_length: 8}'),
        ("model:\n  adapters: [/a/b, acme/c, '/d/true']", 'model:\n  adapters: [b, acme/c, "true"]'),
        (
            '{"adapters": {"/a/b/c": "12"}, "base": {"reference": "/d/e"}}',
            '{"adapters": {"c": "12"}, "base": {"reference": "e"}}',
        ),
        ("prompt: 'a/b /x/y {text}' # \n", "prompt: 'a/b /x/y {text}' # \n"),
        (
            "prompt: /sum/up {text}\ndata: &d /a/b.csv\nknowledge: *d",
            "prompt: /sum/up {text}\ndata: &d b.csv\nknowledge: *d",
        ),
    ],
)
def test_absolute_paths_are_cut_and_others_kept(text: str, short: str) -> None:
    assert shorten_paths(text) == short
    assert list_paths(short) == []


def test_paths_that_a_recipe_names_are_found_wherever_else_they_stand(tmp_path: Path) -> None:
    paths = list_paths("data: /srv/our sets/rows.csv\nmodel: {base: '\\\\server\\share\\tiny'}")
    assert paths == ["/srv/our sets/rows.csv", r"\\server\share\tiny"]
    path = tmp_path / "notes.json"
    for found in paths:
        path.write_text(json.dumps({"made of": found}))
        assert "must hold no path of this machine, got " in scan_file(path.name, path, paths)[0]
    path.write_text("file:///home/ann/rows.csv")
    assert "got file:///home/ann/rows.csv. Write" in scan_file(path.name, path)[0]
