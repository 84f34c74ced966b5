"""docs/walkthrough.md, as it stands there: its commands in one shell, and what they print."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.pages import pattern
from support.servers import free_ports
from support.tls import tls_binary

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/walkthrough.md").read_text()

# With it, the first step is taken too, word for word: an environment, pip, Debian's Redis; and
# nobody has had a Ray on the machine before, who would have left a token.
INSTALL = "TEST_WALKTHROUGH_INSTALL"

# As the page's last table has them, and in its order.
WRONG = """\
echo wrong > wrong
! ray-valkey-spill check "$@" --password-file "$PWD/wrong"
! ray-valkey-spill check "$@" --tls-ca-file "$PWD/away/ca.pem"
! ray-valkey-spill check --url valkeys://127.0.0.1:6390 --username ray --password-file password
! ray-valkey-spill check "$@" --encryption-key-file "$PWD/away/keys"
"""


def steps(page: str) -> list[tuple[str, str]]:
    """Each block of commands, with what the page shows of their output."""
    return re.findall(r"```sh\n(.*?)```(?:\s*```text\n(.*?)```)?", page, re.DOTALL)


class Shell:
    """One bash, to which commands are given as if they were typed; in background jobs too."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._log = directory / "shell.log"
        self._blocks = 0
        with self._log.open("wb") as log:
            self._bash = subprocess.Popen(
                ["bash", "--noprofile", "--norc"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=environment,
                text=True,
            )
        self.run("set -o pipefail; trap 'echo \"FAILED ($?): $BASH_COMMAND\"' ERR")

    def run(self, commands: str, shown: str = "") -> str:
        """Run `commands`, wait for what a job in the background has to print, return all of it."""
        start = len(self.output)
        self._blocks += 1
        done = f"block {self._blocks} is done"
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{commands.rstrip()}\necho {done}\n")
        self._bash.stdin.flush()
        deadline = time.monotonic() + 150
        while True:
            output = self.output[start:]
            assert "FAILED (" not in output, output
            if done in output and re.search(pattern(shown), output, re.DOTALL):
                return output
            assert self._bash.poll() is None, output
            assert time.monotonic() < deadline, f"{shown}\nis not what was printed:\n{output}"
            time.sleep(0.1)

    @property
    def output(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text(errors="replace"))

    def close(self) -> list[psutil.Process]:
        """End it; returns the processes that it had started and that were still there."""
        left = psutil.Process(self._bash.pid).children(recursive=True)
        for process in (*left, self._bash):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        assert self._bash.stdin is not None
        self._bash.stdin.close()
        self._bash.wait()
        return left


@pytest.fixture
def shell(short_dir: Path) -> Iterator[Shell]:
    """In a checkout, with the commands that the first step of the page installs, or without.

    Ray 2.60 leaves a token in the home directory, of a cluster that somebody had there once.
    """
    search_path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    left_out = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "dist")
    if os.environ.get(INSTALL):
        directory = shutil.copytree(ROOT, short_dir / "c", ignore=left_out)
    else:
        binary = tls_binary()
        if binary is None:
            pytest.skip("no server here was built with TLS")
        directory = short_dir / "c"
        directory.mkdir()
        (directory / "redis-server").symlink_to(binary.resolve())
        search_path.insert(0, str(directory))
    (short_dir / "home").mkdir()
    if not os.environ.get(INSTALL):
        (short_dir / "home/.ray").mkdir()
        (short_dir / "home/.ray/auth_token").write_text("5e" * 32)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")},
        "HOME": str(short_dir / "home"),
        "TMPDIR": str(short_dir),  # where `mktemp -d` makes its directory
        "PATH": ":".join(search_path),
    }
    opened = Shell(directory, environment)
    try:
        yield opened
    finally:
        left = opened.close()
    assert not left, f"processes were left running: {left}"


@pytest.mark.slow
def test_the_walkthrough_leads_where_it_says(shell: Shell) -> None:
    page, wrong = PAGE, WRONG
    for written, free in zip(("6390", "6391", "6392"), free_ports(3)):
        page, wrong = page.replace(written, str(free)), wrong.replace(written, str(free))
    (install, shown), *others = steps(page)
    if os.environ.get(INSTALL):
        shell.run(install, shown)
    for commands, shown in others:
        if "touch done" in commands:
            told = shell.run(wrong)
            messages = re.findall(r"^\| .*? \| `(.*?)` \|", page, re.MULTILINE)
            assert len(messages) == wrong.count("!")
            for message in messages:
                # What a node's drivers get begins with what cannot be done.
                said = message.rpartition("until it works (…): ")[2]
                assert re.search(pattern(said), told, re.DOTALL), said
        shell.run(commands, shown)
    assert "30 of 30 objects are right" in shell.output
    assert shell.output.count("Nothing to remove.") == 1
    assert re.search(r"^ +2 nodes +Valkey +(2\d|30) ", shell.output, re.MULTILINE)


def test_the_walkthrough_shows_what_follows_from_its_commands() -> None:
    shown = "".join(shown for _, shown in steps(PAGE))
    for essential in (
        *("30 of 30 objects are right", "sealed with key", "valkeys://", "2 nodes"),
        *("Nothing is stored.", "Nothing to remove."),
    ):
        assert essential in shown
    assert re.search(pattern("ok 12 of …\n0 B"), "ok  7,5 of\n20 rest 0 B", re.DOTALL)
    assert not re.search(pattern("Removed 0 objects"), "Removed 3 objects")
