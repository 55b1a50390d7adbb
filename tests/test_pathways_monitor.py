"""The monitor: files that survive a resume, one line without a terminal, a bar with one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pathways import monitor as module
from pathways.monitor import Monitor, drop_after, read_metrics


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_metrics_are_one_object_per_log_and_not_finite_is_null(tmp_path):
    with Monitor(tmp_path / "run", 10, quiet=True) as monitor:
        monitor.log(1, {"loss": 0.5, "valid/loss": float("nan"), "balance": float("inf")})
        monitor.log(2, {"loss": 0.25})
    first, second = lines(tmp_path / "run" / "metrics.jsonl")
    assert {key: first[key] for key in first if key != "time"} == {
        "step": 1,
        "loss": 0.5,
        "valid/loss": None,
        "balance": None,
    }
    assert second["loss"] == 0.25
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_resumed_run_reads_like_one_that_never_stopped(tmp_path):
    with Monitor(tmp_path / "whole", 6, quiet=True) as monitor:
        for step in range(1, 7):
            monitor.log(step, {"loss": 1 / step})
    with Monitor(tmp_path / "cut", 6, quiet=True) as monitor:
        for step in range(1, 6):
            monitor.log(step, {"loss": 1 / step})
        monitor.event("about to be killed")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with Monitor(tmp_path / "cut", 6, start_step=3, quiet=True) as monitor:
        for step in range(4, 7):
            monitor.log(step, {"loss": 1 / step})
    whole, cut = ([{**row, "time": 0} for row in lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut"))
    assert whole == cut
    assert lines(tmp_path / "cut" / "events.jsonl") == []
    assert not list((tmp_path / "cut").glob("*.partial"))


@given(st.lists(st.integers(0, 20), max_size=20), st.integers(0, 20), st.binary(max_size=8))
def test_drop_after_keeps_exactly_the_steps_up_to_it(tmp_path_factory, steps, last, torn):
    path = tmp_path_factory.mktemp("drop") / "metrics.jsonl"
    whole = [json.dumps({"step": step}) + "\n" for step in steps]
    path.write_bytes("".join(whole).encode() + torn.replace(b"\n", b""))
    drop_after(path, last)
    assert path.read_text() == "".join(line for line, step in zip(whole, steps, strict=True) if step <= last)


def test_a_truncation_that_fails_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        drop_after(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_read_metrics_skips_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"ste')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_without_a_terminal_a_line_every_ten_seconds(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = text_console()
    with Monitor(tmp_path, 1000, console=console) as monitor:
        for step in range(10, 60, 10):  # at 4, 8, 12, 16, 20 seconds: lines at 4 and 16, one more at the end
            now[0] += 4
            monitor.log(
                step, {"loss": 2.5, "rows_per_second": 81234, "balance": 1.234, "learning_rate": 3e-4, "other": 1}
            )
        monitor.event("saved version 3 [bold]")
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    # 10 steps take 4 s, so after 10 of 1000 steps 990 * 0.4 = 396 s = 6 min 36 s are left.
    assert printed[0] == "step 10/1,000  loss 2.50  rows/s 81.2K  balance 1.23  lr 0.000300  6 min 36 s left"
    assert [line.split()[1] for line in printed if line.startswith("step")] == ["10/1,000", "40/1,000", "50/1,000"]
    assert "saved version 3 [bold]" in printed
    assert "\x1b" not in "".join(printed)


def test_on_a_terminal_a_bar(tmp_path):
    console = text_console(terminal=True)
    monitor = Monitor(tmp_path, 4, console=console)
    monitor.log(2, {"loss": 0.125})
    monitor.close()
    monitor.close()
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "2/4" in printed
    assert "loss 0.125" in printed


def test_quiet_prints_nothing_and_still_writes(tmp_path, capfd):
    with Monitor(tmp_path, 4, quiet=True) as monitor:
        monitor.log(1, {"loss": 1.0})
        monitor.event("hello")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["step"], event["message"]) == (1, "hello")


def test_eta_by_hand(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Monitor(tmp_path, 100, start_step=40, quiet=True) as monitor:
        assert monitor.eta() is None
        now[0] = 5.0
        monitor.log(50, {})
        assert monitor.eta() == 25.0  # 10 steps in 5 s, 50 to go
        now[0] = 7.0
        monitor.log(60, {})
        assert monitor.eta() == 14.0  # 20 steps in 7 s, 40 to go


def test_tensorboard_gets_the_finite_scalars(tmp_path):
    with Monitor(tmp_path, 4, quiet=True) as monitor:
        monitor.log(3, {"loss": 0.5, "bad": float("nan")})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content
    assert b"bad" not in content


def test_importing_is_light():
    heavy = ("jax", "rich", "tensorboardX", "numpy", "pyarrow")
    code = f"import sys, pathways.monitor, pathways.report; print([m for m in {heavy} if m in sys.modules])"
    root = Path(module.__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
