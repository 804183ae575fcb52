"""Where the output of ranks goes: files, the terminal, and what is shown of the rank that failed first."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import REPOSITORY

from launch.logs import AgentLogs, Output, RankLogs


def write(output: Output, code: str) -> None:
    """Runs a process whose streams are those of an output."""
    with open(output.stdout, "wb") as stdout, open(output.stderr, "wb") as stderr:
        subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=stderr, check=False, timeout=30)


SAYS = "import sys; print('to stdout', flush=True); print('to stderr', file=sys.stderr)"


def test_rank_0_is_shown_and_every_rank_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = RankLogs(tmp_path)
    for rank in (0, 1):
        write(logs.open(rank), SAYS)
    logs.close()
    assert capfd.readouterr() == ("to stdout\n", "to stderr\n")
    for rank in (0, 1):
        head, *lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert head.startswith("--- ")
        assert sorted(lines) == ["to stderr", "to stdout"]


def test_an_attempt_adds_to_the_file(tmp_path: Path) -> None:
    logs = RankLogs(tmp_path)
    for word in ("first", "second"):
        write(logs.open(1), f"print('{word}')")
    logs.close()
    lines = (tmp_path / "logs" / "rank-1.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["first", "second"]


def test_who_says_nothing_leaves_no_file(tmp_path: Path) -> None:
    logs = RankLogs(tmp_path)
    write(logs.open(0), "")
    logs.close()
    assert list(tmp_path.iterdir()) == []


def test_what_comes_in_pieces_and_without_an_end(tmp_path: Path) -> None:
    logs = RankLogs(tmp_path)
    code = "import os, time; os.write(1, b'one '); time.sleep(0.1); "
    write(logs.open(1), code + "os.write(1, 'l\\u00efne\\nbar 1%\\rbar 99%\\rdone\\nlast'.encode())")
    logs.close()
    assert (tmp_path / "logs" / "rank-1.log").read_text().splitlines()[1:] == ["one lïne", "done", "last"]


def test_a_process_that_lives_on_does_not_hold_the_end_up(tmp_path: Path) -> None:
    logs = RankLogs(tmp_path)
    write(logs.open(1), "import subprocess; print('said', flush=True); subprocess.Popen(['sleep', '30'])")
    logs.close()
    assert "said" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_the_first_failure_is_shown_last(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = RankLogs(tmp_path)
    write(logs.open(0), "raise ValueError('of rank 0')")
    write(logs.open(1), "import sys; print('before', file=sys.stderr)\nraise ValueError('of rank 1')")
    logs.close()
    shown = capfd.readouterr().err
    assert "of rank 1" not in shown
    logs.show_end(0)
    assert capfd.readouterr().err == ""  # it was shown when it came
    logs.show_end(1)
    shown = capfd.readouterr().err
    assert shown.startswith("rank 1 on ")
    assert str(tmp_path / "logs" / "rank-1.log") in shown.splitlines()[0]
    assert shown.splitlines()[1] == "Traceback (most recent call last):"
    assert shown.endswith("ValueError: of rank 1\n")
    logs.show_end(7)  # on another machine


def test_the_last_lines_stand_in_for_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = RankLogs(tmp_path)
    write(logs.open(1), "import sys; [print('line', i, file=sys.stderr) for i in range(100)]")
    logs.close()
    logs.show_end(1)
    assert capfd.readouterr().err.splitlines()[1:] == [f"line {i}" for i in range(75, 100)]


def test_a_mistake_of_the_user_is_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logs = RankLogs(tmp_path)
    write(logs.open(1), "import sys; print('error: data.train: no such mount', file=sys.stderr)")
    logs.close()
    logs.show_end(1)
    assert capfd.readouterr().err == "error: data.train: no such mount\n"


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file")
    logs = RankLogs(tmp_path)
    write(logs.open(0), SAYS)
    logs.close()
    assert "to stdout" in capfd.readouterr().out
    assert "no more of the output is written" in caplog.text


def test_torch_is_told_where_its_ranks_write(tmp_path: Path) -> None:
    logs = RankLogs(tmp_path)
    specs = AgentLogs(logs)
    destinations = specs.reify({0: {"RANK": "4"}, 1: {"RANK": "5"}})
    for local_rank in (0, 1):
        with open(destinations.stdouts[local_rank], "w") as stdout:
            stdout.write(f"local rank {local_rank}\n")
    logs.close()
    assert "local rank 0" in (tmp_path / "logs" / "rank-4.log").read_text()
    assert "local rank 1" in (tmp_path / "logs" / "rank-5.log").read_text()
    assert set(destinations.error_files) == {0, 1}


ON_A_TERMINAL = """
import subprocess, sys
from pathlib import Path
from launch.logs import RankLogs
logs = RankLogs(Path(sys.argv[1]))
output = logs.open(0)
code = "import os, sys; print(os.isatty(1), os.isatty(2), os.get_terminal_size(2).columns); "
code += "sys.stderr.write('a\\\\rb\\\\n')"
with open(output.stdout, "wb") as stdout, open(output.stderr, "wb") as stderr:
    subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=stderr)
logs.close()
"""


def test_rank_0_has_a_terminal_where_there_is_one(tmp_path: Path) -> None:
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 133))
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path)], stdout=its_end, stderr=its_end, cwd=REPOSITORY
    )
    os.close(its_end)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other end was closed
        pass
    os.close(terminal)
    assert process.wait(30) == 0
    assert b"True True 133\r\n" in shown  # one new line, by the terminal itself
    assert b"a\rb\r\n" in shown
    assert sorted((tmp_path / "logs" / "rank-0.log").read_text().splitlines()[1:]) == ["True True 133", "b"]
