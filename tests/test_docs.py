"""What the documents say is so: links, commands, JSON, the first walk."""

import json
import re
import shlex
import subprocess
from contextlib import ExitStack
from pathlib import Path

import jsonschema
import pytest

from vdpabridge.cli.command_table import COMMANDS
from vdpabridge.cli.exit_codes import TABLE
from vdpabridge.cli.main import parser

from .cli.test_control import controlled
from .cli.test_serve import COMMAND, ENVIRONMENT, run
from .support.waiting import wait_until
from .uapi.test_header import PROPOSAL, written

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("vdpabridge/**/*.md")]
SCHEMA = json.loads((ROOT / "docs" / "output.schema.json").read_text())


def parse(words):
    """The words of a documented command, taken apart by the command line itself."""
    try:
        return parser().parse_args(words)
    except SystemExit as error:
        pytest.fail(f"{shlex.join(words)}: ended with {error.code}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_as_they_are_written(document):
    """Those in blocks of their own, up to what the shell does with them."""
    for block in re.findall(r"^```\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            for part in re.split(r"[|&>#]| 2>", line.split("  #")[0]):
                if part.split()[:1] == ["vdpabridge"]:
                    parse(shlex.split(part.replace("...", "x"))[1:])


def test_every_command_and_exit_code_is_documented():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert [name for name in COMMANDS if f"`{name}" not in text and f" {name} " not in text] == ["demo"]
    assert set(re.findall(r"^\| (\d+) \|", text, re.MULTILINE)) == {str(code) for code in TABLE}


def test_every_command_has_a_shape():
    named = {name.split(" ")[0] for name in SCHEMA["$defs"]} - {"step", "error"}
    assert named == set(COMMANDS) - {"del"}, "which prints nothing"


def check(name, text):
    jsonschema.validate(json.loads(text), {**SCHEMA, "$ref": f"#/$defs/{name}"})


def test_the_schema_refuses_what_is_something_else():
    with pytest.raises(jsonschema.ValidationError):
        check("suspend", '{"state": "running", "more": 1}')


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["nonsense"], 2),
        (["status", "/nowhere"], 1),
        (["inspect", "/nowhere"], 1),
        (["show", "nothing"], 1),
        (["dev"], 2),
    ],
)
def test_errors_have_their_shape(words, code):
    done = run("-j", *words)
    assert done.returncode == code
    check("error", done.stderr)


def test_output_has_its_shape(tmp_path):
    image, header = str(tmp_path / "image"), written(tmp_path, PROPOSAL)
    with (
        controlled(tmp_path, "a") as (path, control, _),
        controlled(tmp_path, "b") as (_, other, _),
        subprocess.Popen([*COMMAND, "-j", "guest", path], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as guest,
    ):
        try:
            check("guest", guest.stdout.readline())
            for words in (
                ["status", control],
                ["suspend", control],
                ["status", control],
                ["resume", control],
                ["save", control, image],
                ["statistics", control],
                ["load", other, image],
                ["migrate", control, other],
                ["status", control],
                ["inspect", image],
                ["inspect", image, image],
                ["udev-rules", "--helper"],
                ["service-file", "socket"],
                ["descriptor", "blk", "--binary", "/usr/bin/x"],
                ["uapi", header],
            ):
                done = run("-j", *words)
                assert done.returncode == 0, done.stderr
                check(words[0], done.stdout)
            check("uapi --diff", run("-j", "uapi", header, "--diff", "/usr/include/linux/vhost.h").stdout)
            check("inspect --diff", run("-j", "inspect", "--diff", image, image).stdout)
            check("serve", run("serve", "sim:fs", "--print-capabilities").stdout)
        finally:
            guest.kill()
    for line in run("-j", "demo").stdout.splitlines():
        check("demo", line)


def test_the_first_walk(tmp_path):
    """The commands of the README, in its order, with a guest that is never wrong."""
    text = (ROOT / "README.md").read_text()
    walk = text[text.index("## A first walk") : text.index("## For hardware vendors")]
    blocks = re.findall(r"^```\n(.*?)^```", walk, re.DOTALL | re.MULTILINE)
    lines = [line.split("#")[0].split() for block in blocks for line in block.splitlines()]
    assert [words[1] for words in lines] == [
        "serve",
        "guest",
        "status",
        "suspend",
        "resume",
        "save",
        "inspect",
        "serve",
        "migrate",
    ]
    with ExitStack() as stack:

        def start(words):
            process = subprocess.Popen(
                [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd=tmp_path
            )
            stack.callback(process.communicate)
            stack.callback(process.terminate)
            return process

        for words in lines:
            words = [word for word in words[1:] if word != "&"]
            if words[0] == "serve":
                start(words)
                wait_until(lambda words=words: (tmp_path / words[-1]).exists())
            elif words[0] == "guest":
                guest = start(words)
                assert b"as fs" in guest.stdout.readline()
                assert b" requests, " in guest.stdout.readline()
            else:
                done = run(*words, cwd=tmp_path)
                assert done.returncode == 0, done.stderr
        assert (tmp_path / "timeline.svg").read_text().startswith("<svg")
        assert guest.poll() is None
        assert run("status", "fs.control", cwd=tmp_path).stdout.startswith(
            "sim:fs: suspended, front-end connected, its"
        )
