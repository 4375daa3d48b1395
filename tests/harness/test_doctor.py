"""The doctor says what there is, what is wrong, and how to mend it."""

import os
from types import SimpleNamespace

from rlbook.cli import main
from rlbook.harness import doctor
from rlbook.harness.doctor import GIB, Finding, examine


def test_the_report_covers_what_is_promised():
    names = [finding.what for finding in examine()]
    expected = "python cores memory /dev/shm disk torch ray gymnasium GPU Atari"
    assert set(expected.split()) <= set(names)
    assert all(finding.value for finding in examine())


def test_cores_are_those_this_process_may_use():
    assert doctor.usable_cores() == len(os.sched_getaffinity(0))


def test_what_is_wrong_comes_with_how_to_mend_it(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB // 2))
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 2 * GIB)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    wrong = {finding.what: finding.wrong for finding in examine() if finding.wrong}
    assert {"cores", "memory", "/dev/shm", "disk", "Atari"} <= set(wrong)
    assert "--shm-size" in wrong["/dev/shm"] and "rlbook[atari]" in wrong["Atari"]


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "Path", lambda name: limit)
    limit.write_text("max\n")
    whole = doctor.memory_bytes()
    limit.write_text(f"{GIB}\n")
    assert doctor.memory_bytes() == min(GIB, whole) == GIB


def test_a_line_is_marked_where_something_is_wrong():
    assert str(Finding("cores", "2")) == "ok  cores          2"
    assert str(Finding("cores", "1", "buy one")).startswith(" !  cores")
    assert str(Finding("cores", "1", "buy one")).endswith("→ buy one")


def test_it_says_what_to_start_here(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 16)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: 64 * GIB)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert doctor.here() == (16, 64.0, 1)
    main(["doctor"])
    said = capsys.readouterr().out
    assert "To begin with, on 16 cores, 64 GiB, 1 GPUs:" in said
    assert "    rlbook train impala --num-actors 14 --device auto" in said


def test_a_cluster_that_is_not_there_is_one_line(capsys):
    assert main(["doctor", "--ray-address", "127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.startswith("rlbook: ray_address: no Ray cluster answers at")
