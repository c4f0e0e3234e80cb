"""Whatever terminal, log or pipe there is, or none: nothing that is shown stops a script."""

import os
import sys
import threading

import pytest

from common import console
from common.errors import UserError

SCRIPT = """
import sys
from common import console
from common.errors import UserError
{before}
console.begin()
console.begin()  # study.py starts other scripts
console.say("0.5 ± 0.1 σ – naïve")
print("0.5 ± 0.1", file=sys.stderr)
with console.progress(3, "é", is_main=True) as bar: bar.update()
print(*range(30_000))
sys.stdout.flush()
print("the end", file=sys.stderr)
open("done", "w").close()
{after}
"""


def script(run_command, before="", after="", shell="exec {}", **environment):
    """Run a process that shows things; it must reach its end."""
    command = [sys.executable, "-c", SCRIPT.format(before=before, after=after)]
    line = shell.format('"$@"')
    return run_command("bash", "-c", line, "bash", *command, **environment)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_letters_that_a_terminal_lacks_become_question_marks(run_command, tmp_path, encoding):
    done = script(run_command, PYTHONIOENCODING=encoding, shell="{} > out 2> err")
    assert done.returncode == 0 and (tmp_path / "done").exists()
    first = (tmp_path / "out").read_bytes().decode(encoding).splitlines()[0]
    expected = "0.5 ± 0.1 σ – naïve".encode(encoding, "replace").decode(encoding)
    assert first == expected


@pytest.mark.parametrize(
    "shell",
    [
        "{} >&-",
        "{} 2>&-",
        "{} >&- 2>&- <&-",
        "{} > /dev/full",
        "{} > /dev/full 2>&1",
        "set -o pipefail; {} | true",
        "set -o pipefail; {} 2>&1 | head -1",
    ],
)
def test_nobody_needs_to_read_what_is_shown(run_command, tmp_path, shell):
    done = script(run_command, shell=shell)
    assert (tmp_path / "done").exists()
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("show", ["console.say('a note')", "print('a note', file=sys.stderr)"])
def test_what_is_said_is_there_before_the_process_is_killed(run_command, show, unbuffered):
    code = f"import os, sys; from common import console; console.begin(); {show}; "
    code += "os.kill(os.getpid(), 9)"
    done = run_command(sys.executable, "-c", code, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == -9 and "a note" in done.stdout + done.stderr


@pytest.mark.parametrize("before", ["sys.stdout = sys.stderr = None", "sys.stdout.close()"])
def test_streams_that_are_gone_inside_python_are_replaced(run_command, tmp_path, before):
    assert script(run_command, before).returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("stream", [None, "closed", "broken"])
def test_other_code_may_have_no_streams_either(monkeypatch, tmp_path, stream):
    file = stream and open(tmp_path / "x" if stream == "closed" else "/dev/full", "w")  # noqa: SIM115
    if stream == "closed":
        file.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, file)
    console.say("a line")
    with console.progress(2, "steps", is_main=True) as bar:
        bar.update()
    if stream == "broken":
        with pytest.raises(OSError):
            file.close()


def test_a_user_error_is_one_line_and_status_1_of_a_script(run_command):
    done = script(run_command, after="raise UserError('two\\nlines')")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "error: two lines"
    assert "Traceback" not in done.stderr
    done = script(run_command, after="raise ValueError('a mistake')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_server_can_catch_a_user_error():
    caught = []

    def serve():
        try:
            raise UserError("bad")
        except Exception as error:
            caught.append(str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert caught == ["bad"] and not issubclass(UserError, SystemExit)


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"RANK": "1"}, True),  # left over
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),
        ({"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": ""}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, True),  # a pod, which started no launcher
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, False),  # on a second machine
    ],
)
def test_one_process_speaks_for_those_that_a_launcher_started(run_command, environment, speaks):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    done = script(run_command, after="raise UserError('bad')", **environment)
    assert done.returncode == 1
    assert ("error: bad" in done.stderr) == speaks
    # of each machine one process names itself
    assert ("error: process 2: bad" in done.stderr) == (environment.get("RANK") == "2")
