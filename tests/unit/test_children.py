from __future__ import annotations

from aseer.children import inherited


def test_a_child_is_not_told_which_of_the_launchers_workers_its_parent_is():
    ours = {"PATH": "/bin", "LOCAL_MODELS": "/data", "MY_RANK": "3", "NCCL_DEBUG": "x"}
    of_a_worker = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    found = inherited({**ours, **of_a_worker}, ["/lib"])
    assert found == {**ours, "PYTHONPATH": "/lib"}


def test_a_child_imports_from_where_its_parent_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = inherited({"PYTHONPATH": "/old"}, ["", "/scripts", "/lib"])
    assert found == {"PYTHONPATH": f"{tmp_path}:/scripts:/lib"}
