"""Votes are kept nowhere, in a file, or in a dataset; a line is whole, and none is lost."""

import contextlib
import json
import threading
import time

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import HfApi, RepoUrl

from blip2.ui import votes
from blip2.ui.votes import Votes


def test_by_default_none_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nowhere = Votes()
    nowhere.append({"vote": "Tie"})
    assert not nowhere and list(tmp_path.iterdir()) == []


def test_a_file_gets_a_line_a_vote(tmp_path):
    file = tmp_path / "votes.jsonl"
    kept = Votes(file)
    assert kept
    kept.append({"vote": "A is better", "question": "Größe?\nzwei Zeilen"})
    Votes(file).append({"vote": "Tie"})
    lines = file.read_text("utf-8").splitlines()
    assert lines[0] == '{"vote": "A is better", "question": "Größe?\\nzwei Zeilen"}'
    assert json.loads(lines[1]) == {"vote": "Tie"}


def test_votes_of_many_visitors_stay_apart(tmp_path):
    kept = Votes(tmp_path / "votes.jsonl")

    def visit(who):
        for _ in range(20):
            kept.append({"who": who, "text": "x" * 9000})

    threads = [threading.Thread(target=visit, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert sorted(row["who"] for row in rows) == sorted(list(range(8)) * 20)


def test_the_lock_is_held_while_a_line_is_written(tmp_path):
    held = []

    @contextlib.contextmanager
    def lock():
        held.append((tmp_path / "votes.jsonl").exists())
        yield
        held.append((tmp_path / "votes.jsonl").read_text())

    Votes(tmp_path / "votes.jsonl", lock()).append({"vote": "Tie"})
    assert held == [False, '{"vote": "Tie"}\n']


@pytest.fixture
def hub(monkeypatch):
    """The Hub's dataset: the files of each commit, by name; schedulers are stopped at the end."""
    repositories, commits, schedulers = [], [], []
    real = huggingface_hub.CommitScheduler

    def create(api, repo_id, **settings):
        repositories.append((repo_id, settings))
        return RepoUrl(f"https://huggingface.co/datasets/{repo_id}")

    def commit(api, *, repo_id, repo_type, operations, **settings):
        assert (repo_id, repo_type) == ("me/votes", "dataset")
        commits.append({operation.path_in_repo: operation.path_or_fileobj.read() for operation in operations})

    def start(**settings):
        schedulers.append(real(**settings))
        return schedulers[-1]

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub, "CommitScheduler", start)
    monkeypatch.setattr(votes, "EVERY", 0.002)  # minutes
    yield repositories, commits, schedulers
    for scheduler in schedulers:
        scheduler.stop()


def test_a_dataset_gets_them_all(hub):
    """Through huggingface_hub's own scheduler; only its calls of the Hub are replaced."""
    repositories, commits, schedulers = hub
    first, second = Votes.in_dataset("me/votes"), Votes.in_dataset("me/votes")
    assert repositories[0] == ("me/votes", {"private": True, "repo_type": "dataset", "exist_ok": True})
    assert first and first.file.name != second.file.name  # two Spaces must not write over each other
    assert first._lock is schedulers[0].lock
    first.append({"vote": "Tie", "question": "warum?"})
    deadline = time.monotonic() + 20
    while not commits and time.monotonic() < deadline:
        time.sleep(0.02)
    first.append({"vote": "Neither"})
    while json.dumps({"vote": "Neither"}).encode() not in commits[-1].get(first.file.name, b""):
        assert time.monotonic() < deadline, commits
        time.sleep(0.02)
    rows = [json.loads(line) for line in commits[-1][first.file.name].splitlines()]
    assert rows == [{"vote": "Tie", "question": "warum?"}, {"vote": "Neither"}]
    assert all(list(commit) == [first.file.name] for commit in commits)


@pytest.mark.parametrize(
    "failure", [httpx2.ConnectError("no route to host"), PermissionError("no route to host")]
)
def test_a_dataset_that_cannot_be_had_is_told(hub, monkeypatch, failure):
    def create(api, repo_id, **settings):
        raise failure

    monkeypatch.setattr(HfApi, "create_repo", create)
    with pytest.raises(ValueError, match=r"me/votes: no route to host\. Give a secret HF_TOKEN"):
        Votes.in_dataset("me/votes")
