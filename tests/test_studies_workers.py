"Workers: order and failures, against doing the same tasks one after the other; death, Ctrl-C and orphans on real processes."

import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from vlm_reward.studies.workers import Progress, Worker, one_line, run_tasks


def work(n, tick):
    for i in range(n):
        tick(i + 1)
    if n % 5 == 4:
        raise ValueError(f"task {n} cannot be done\nat all")
    return n, os.getpid()


def die(tick):
    os.kill(os.getpid(), signal.SIGKILL)


def speak(tick):
    print("from a task")
    os.write(2, b"from a C library\n")
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def endless(path, tick):
    Path(path).write_text(str(os.getpid()))
    for i in range(10**6):
        tick(i)
        time.sleep(0.05)


def alive(pid):
    # a zombie that nobody waited for is dead, too
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_processes_give_what_one_process_gives():
    tasks = {f"task{n}": partial(work, n) for n in range(9)}
    amounts = {name: 9 for name in tasks}
    alone = run_tasks(tasks, amounts, stream=io.StringIO())
    crew = run_tasks(tasks, amounts, workers=3, stream=io.StringIO())
    assert list(alone) == list(crew) == list(tasks)
    assert [(o.result and o.result[0], o.error) for o in alone.values()] == [
        (o.result and o.result[0], o.error) for o in crew.values()
    ]
    assert crew["task4"].error == "task 4 cannot be done at all"
    assert "work" in crew["task4"].trace
    pids = {o.result[1] for o in crew.values() if o.result}
    assert 1 <= len(pids) <= 3 and os.getpid() not in pids


def test_a_killed_worker_is_replaced():
    tasks = {"first": die, "second": die, **{f"task{n}": partial(work, n) for n in range(4)}}
    outcomes = run_tasks(tasks, dict.fromkeys(tasks, 4), workers=2, stream=io.StringIO())
    assert "SIGKILL" in outcomes["first"].error and "SIGKILL" in outcomes["second"].error
    assert [outcomes[f"task{n}"].result[0] for n in range(4)] == [0, 1, 2, 3]


def test_output_of_workers_goes_to_the_log_and_interrupts_are_ignored(tmp_path, capfd):
    log = tmp_path / "log.txt"
    outcome = run_tasks({"speak": speak}, {"speak": 1}, workers=2, log=log, stream=io.StringIO())["speak"]
    assert outcome.result is True
    assert set(log.read_text().splitlines()) == {"from a task", "from a C library"}
    assert capfd.readouterr() == ("", "")


def test_a_task_that_cannot_be_imported_is_a_failed_task(monkeypatch, tmp_path):
    (tmp_path / "gone_tasks.py").write_text("def one(tick):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import gone_tasks

    (tmp_path / "gone_tasks.py").unlink()
    tasks = {"gone": gone_tasks.one, "good": partial(work, 2)}
    outcomes = run_tasks(tasks, {"gone": 1, "good": 2}, workers=2, stream=io.StringIO())
    assert "gone_tasks" in outcomes["gone"].error
    assert outcomes["good"].result[0] == 2


def test_stop_ends_a_busy_worker(tmp_path):
    worker = Worker()
    worker.give("endless", partial(endless, tmp_path / "pid"))
    assert until((tmp_path / "pid").exists)
    start = time.monotonic()
    worker.stop()
    assert not worker.process.is_alive() and time.monotonic() - start < 5


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from functools import partial
from test_studies_workers import endless
from vlm_reward.studies.workers import run_tasks
if __name__ == "__main__":
    tasks = {{name: partial(endless, {folder!r} + "/" + name) for name in ("a", "b")}}
    run_tasks(tasks, dict.fromkeys(tasks, 10**6), workers=2)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_parent(tmp_path, sent):
    "Ctrl-C goes to the whole process group, as a terminal sends it; SIGKILL to the parent alone."
    script = tmp_path / "study.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    files = [tmp_path / "a", tmp_path / "b"]
    assert until(lambda: all(f.exists() and f.read_text() for f in files), 30)
    pids = [int(f.read_text()) for f in files]
    os.killpg(parent.pid, sent) if sent == signal.SIGINT else os.kill(parent.pid, sent)
    _, error = parent.communicate(timeout=20)
    assert parent.returncode != 0
    assert until(lambda: not any(map(alive, pids))), "a worker is still there"
    # one trace-back at most, the parent's own: workers say nothing
    assert error.count("Traceback") <= 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_a_file_gets_lines():
    bar, lines = Terminal(), io.StringIO()
    for stream in (bar, lines):
        tasks = {f"task{n}": partial(work, 50) for n in range(3)}
        run_tasks(tasks, dict.fromkeys(tasks, 50), stream=stream)
    assert "150/150" in bar.getvalue() and "\r" in bar.getvalue()
    assert "\r" not in lines.getvalue() and len(lines.getvalue().splitlines()) == 3


def test_time_left_is_that_of_all_tasks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vlm_reward.studies.workers.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress({"a": 10, "b": 30}, stream=stream, every=1.0)
    now[0] = 500.0  # loading takes its time, but only once
    progress.tick("a", 4)
    now[0] = 560.0
    progress.tick("b", 10)
    assert "about 3 min left" in stream.getvalue().splitlines()[-1]  # 10 ticks in 60 s, 26 to go


@pytest.mark.parametrize("text", ["", "one", "two\nlines", "a\n\n b\t c"])
def test_errors_are_one_line(text):
    for kind in (ValueError, RuntimeError, KeyError, OSError):
        line = one_line(kind(text))
        assert line and "\n" not in line
