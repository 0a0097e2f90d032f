from __future__ import annotations

from aseer.node.children import inherited


def test_a_child_is_not_told_which_of_the_launchers_workers_its_parent_is():
    ours = {"PATH": "/bin", "LOCAL_MODELS": "/data", "MY_RANK": "3", "NCCL_DEBUG": "x"}
    of_a_worker = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "VLLM_DP_SIZE": "2",
        "VLLM_DP_RANK_LOCAL": "1",
    }
    found = inherited({**ours, **of_a_worker}, ["/lib"])
    assert found == {**ours, "PYTHONPATH": "/lib"}


def test_a_child_does_not_allocate_device_memory_as_the_trainer_does():
    of_a_trainer = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_HIP_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:512",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    assert inherited(of_a_trainer, ["/lib"]) == {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": "/lib",
    }


def test_a_child_imports_from_where_its_parent_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = inherited({"PYTHONPATH": "/old"}, ["", "/scripts", "/lib"])
    assert found == {"PYTHONPATH": f"{tmp_path}:/scripts:/lib"}


def test_a_working_directory_that_is_gone_and_paths_that_are_no_texts_are_left_out(
    tmp_path, monkeypatch
):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = inherited({}, ["", tmp_path, "/lib"])
    assert found == {"PYTHONPATH": "/lib"}
