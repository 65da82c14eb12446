"""`launch=kubernetes` and the verbs against a stand-in for the API server: what is asked of it, and what a user is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmscale.cli import main
from llmscale.errors import ClusterError, RunError
from llmscale.launch import kubernetes, logs
from llmscale.launch.attempts import begin, end
from tests.launch import api_server
from tests.launch.api_server import BREAKS, SLOW, Cluster, serving

WORDS = ["rlhf", "experiment=demo", "launch=kubernetes", "launch.image=registry.example/llmscale:1"]
SFT = ["sft", *WORDS[1:]]
RUN = "runs/demo/rlhf"
CANARY = "canary-8d21f0"
Verb = Callable[..., str]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kubernetes, "PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(logs, "POLL_PODS_S", 0.02)
    with serving(tmp_path) as served:
        yield served


@pytest.fixture
def llmscale(capsys: pytest.CaptureFixture) -> Verb:
    """Runs a command and returns what it printed."""

    def verb(*words: str, exit_code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        printed = capsys.readouterr()
        assert ended.value.code == exit_code, f"{words}\n{printed.out}\n{printed.err}"
        assert "Traceback" not in printed.err
        return printed.out + printed.err

    return verb


def pods_of(cluster: Cluster) -> str:
    return cluster.only()["metadata"]["name"]


# ---------------------------------------------------------------- a run's life


def test_a_run_is_submitted_followed_cancelled_and_resumed(cluster: Cluster, llmscale: Verb) -> None:
    submitted = json.loads(llmscale("submit", *WORDS, "--json"))
    made = cluster.only()
    name = made["metadata"]["name"]
    assert made["kind"] == "RayJob" and name == submitted["id"]  # demo-rlhf-a1b2c3 is a name as it is
    assert submitted["job"] == f"llmscale/RayJob/{name}"
    assert made == yaml.safe_load(Path(RUN, "launch/job.yaml").read_text())
    variables = {v["name"]: v["value"] for v in head(made)["env"]}
    assert variables["LLMSCALE_RUN_ID"] == submitted["id"]

    cluster.add_pod(f"{name}.head", "head", "Pending", conditions=[unschedulable("0/3 nodes have a GPU")])
    assert "queued (Unschedulable: 0/3 nodes have a GPU)" in llmscale("status", RUN)
    assert "running already" not in llmscale("runs") and "is queued already" in llmscale("submit", *WORDS, exit_code=2)

    made["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    cluster.pods.clear()
    cluster.add_pod(f"{name}.head", "head", "Running", "step 1", "step 2")
    cluster.add_pod(f"{name}.policy", "policy", "Running", "a policy")
    assert json.loads(llmscale("status", RUN, "--json"))["state"] == "running"
    assert "step 1\nstep 2\n" in llmscale("logs", RUN, "--role", "driver")
    assert "a policy" in llmscale("logs", RUN) and "a policy" not in llmscale("logs", RUN, "--role", "head")
    assert "There is: head, policy" in llmscale("logs", RUN, "--role", "critic", exit_code=2)
    assert "not seen from here" in llmscale("logs", RUN, "--attempt", "1", exit_code=2)

    assert "saves after its step" in llmscale("cancel", RUN)
    assert not cluster.objects and not any("DELETE /api/v1" in request for request in cluster.asked)
    assert "it was taken away, and saves" in llmscale("status", RUN)
    cluster.pods.clear()
    assert json.loads(llmscale("status", RUN, "--json"))["state"] == "cancelled"

    resumed = json.loads(llmscale("resume", RUN, "launch.max_retries=7", "--json"))
    assert resumed["id"] == submitted["id"] and cluster.only()["spec"]["backoffLimit"] == 7
    llmscale("cancel", RUN, "--now")
    assert any("DELETE /api/v1" in request and "gracePeriodSeconds=0" in request for request in cluster.asked)


def head(made: dict[str, Any]) -> dict[str, Any]:
    return made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]


def unschedulable(message: str) -> dict[str, str]:
    return {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}


def test_logs_are_followed_until_the_run_has_ended(
    cluster: Cluster, llmscale: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line once, though answers break off and do not come in time."""
    llmscale("submit", *SFT)
    made = cluster.only()
    made["status"] = {"replicatedJobsStatus": [{"name": "run", "ready": 1}]}
    name = f"{pods_of(cluster)}.0"
    cluster.add_pod(name, "trainer", "Running", "step 0")
    lines = iter(range(1, 5))
    monkeypatch.setattr(kubernetes, "TIMEOUT_S", 0.5)

    def meanwhile(pause_s: float) -> None:
        number = next(lines, None)
        if number is None:
            made["status"] = {"conditions": [{"type": "Completed", "status": "True"}]}
            return
        cluster.logs[name].append(f"step {number}")
        cluster.next_answers = [0, 0, {1: BREAKS, 2: SLOW, 3: 500}.get(number, 0)]  # status, pods, log

    monkeypatch.setattr(logs.time, "sleep", lambda pause_s: meanwhile(pause_s) if pause_s == 0.02 else None)
    monkeypatch.setattr(kubernetes, "PAUSES_S", (0.0, 0.0))
    printed = llmscale("logs", "runs/demo/sft", "-f")
    assert printed == f"==> {name} <==\n" + "".join(f"step {n}\n" for n in range(5))


@pytest.mark.parametrize(
    ("kind", "status", "state", "reason"),
    [
        ("RayJob", {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "done", ""),
        ("RayJob", {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "failed", ""),
        ("RayJob", {"jobDeploymentStatus": "Failed", "reason": "Why", "message": "a\nb"}, "failed", "Why: a"),
        ("RayJob", {"jobDeploymentStatus": "Suspended"}, "queued", "suspended"),
        ("RayJob", {"jobDeploymentStatus": "Retrying"}, "queued", "started again"),
        ("RayJob", {}, "queued", "ImagePullBackOff: no such image"),
        ("JobSet", {"conditions": [{"type": "Completed", "status": "True"}]}, "done", ""),
        ("JobSet", {"conditions": [{"type": "Failed", "status": "True", "message": "rule 2"}]}, "failed", "rule 2"),
        ("JobSet", {"conditions": [{"type": "Suspended", "status": "True"}]}, "queued", "suspended"),
        ("JobSet", {"conditions": [{"type": "Suspended", "status": "False"}]}, "queued", "ImagePullBackOff"),
        ("JobSet", {"replicatedJobsStatus": [{"name": "run", "ready": 2}]}, "running", ""),
    ],
)
def test_what_the_cluster_says_is_the_state(
    kind: str, status: dict[str, Any], state: str, reason: str, cluster: Cluster
) -> None:
    cluster.objects[f"{kind.lower()}s/trial"] = an_object(kind) | {"status": status}
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    container = {"name": "x", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": waiting}
    cluster.add_pod("trial.0", "head", "Pending", containerStatuses=[container])
    found = kubernetes.state_of(kubernetes.Place(kind, "trial", "llmscale", None))
    assert found is not None and found.state == state and reason in found.reason


def an_object(kind: str = "RayJob", namespace: str = "llmscale") -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": "trial", "namespace": namespace, "annotations": {}}, "spec": {}}


def test_the_run_directory_is_the_truth_where_it_is_seen(cluster: Cluster, llmscale: Verb) -> None:
    llmscale("submit", *WORDS)
    attempt = begin(Path(RUN).absolute(), "x", ["head"], 3)
    (attempt / "driver-head.log").write_text("error: model.path: there is none\n  Give one.\n")
    end(attempt, 2)
    cluster.only()["status"] = {"jobDeploymentStatus": "Failed", "reason": "AppFailed"}
    for asked in ([], [401]):
        cluster.next_answers = asked
        found = json.loads(llmscale("status", RUN, "--json"))
        assert (found["state"], found["exit_code"]) == ("failed", 2) and "there is none" in found["traceback"]
    assert "there is none" in llmscale("logs", RUN)
    assert not any("/log" in request for request in cluster.asked)


def test_what_has_ended_gives_way_to_the_next_and_what_works_does_not(cluster: Cluster, llmscale: Verb) -> None:
    llmscale("submit", *WORDS)
    cluster.only()["status"] = {"jobDeploymentStatus": "Failed"}
    llmscale("resume", RUN)
    assert [r.partition(" ")[0] for r in cluster.asked[-4:]] == ["GET", "DELETE", "GET", "POST"]
    cluster.only()["status"] = {"jobDeploymentStatus": "Running"}
    assert "is running already" in llmscale("resume", RUN, exit_code=2)
    with pytest.raises(RunError, match=f"is there already, of run {pods_of(cluster)}"):
        kubernetes.submit(cluster.only(), None)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("answers", "where", "says"),
    [
        ([401], "launch.context", "does not know you (401)"),
        ([403], "launch.namespace", "you may not get a RayJob in namespace llmscale (403: as planned)"),
        ([0, 404], "launch", "the cluster knows no RayJob (404)"),
        ([0, 422], "launch", "the cluster refuses to create llmscale/RayJob/trial (422: as planned)"),
        ([429, 429, 429], "launch.context", "answers 429 to 3 tries"),
        ([500, 500, 500], "launch.context", "answers 500 to 3 tries"),
        ([SLOW, SLOW, SLOW], "launch.context", "does not answer"),
        ([0, 0, BREAKS, BREAKS, BREAKS], "launch.context", "does not answer"),
    ],
)
def test_what_the_server_refuses_is_one_line(
    answers: list[int], where: str, says: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    if SLOW in answers:
        monkeypatch.setattr(kubernetes, "TIMEOUT_S", 0.3)
        monkeypatch.setattr(api_server, "SLOW_S", 0.6)
    cluster.next_answers = list(answers)
    with pytest.raises(ClusterError) as caught:
        kubernetes.submit(an_object(), None)
        kubernetes.state_of(kubernetes.Place("RayJob", "trial", "llmscale", None))
    error = caught.value
    assert (error.where, error.exit_code) == (where, 3) and says in error.what and "\n" not in error.what
    assert error.fix or answers[-1] == 422


def test_a_context_or_namespace_that_there_is_not_is_named(cluster: Cluster, llmscale: Verb) -> None:
    for word, says in [
        ("context=stranger", "launch.context: the API server at http://127.0.0.1:"),
        ("context=nowhere", "launch.context: no cluster is configured here"),
        ("namespace=other", "launch.namespace: there is no namespace other"),
    ]:
        printed = llmscale("submit", *WORDS, f"launch.{word}", exit_code=3)
        assert printed.startswith(f"error: {says}") and len(printed.splitlines()) == 2


def test_an_object_whose_answer_was_lost_is_ours_and_that_of_another_is_not(cluster: Cluster) -> None:
    ours = an_object()
    ours["metadata"]["annotations"]["llmscale/run-id"] = "Trial"
    cluster.next_answers = [0, BREAKS]
    assert str(kubernetes.submit(ours, "here")) == "llmscale/RayJob/trial@here" and len(cluster.asked) == 4
    cluster.next_answers = [404]  # it comes between our look and our try
    with pytest.raises(RunError, match="is there already, of run Trial") as caught:
        kubernetes.submit(an_object(), None)
    assert caught.value.where == "run.name"


@pytest.mark.parametrize("answers", [[429, 500], [0, 503, 429]])
def test_what_passes_is_tried_again(answers: list[int], cluster: Cluster) -> None:
    cluster.next_answers, cluster.retry_after_s = list(answers), "0"
    kubernetes.submit(an_object(), None)
    assert len(cluster.asked) == 4 and cluster.only()["kind"] == "RayJob"


def test_one_cluster_that_is_away_does_not_hide_the_other_runs(cluster: Cluster, llmscale: Verb) -> None:
    llmscale("submit", *WORDS)
    llmscale("submit", *SFT)
    cluster.next_answers = [401]
    listed = json.loads(llmscale("runs", "--json"))
    assert sorted(run["state"] for run in listed) == ["queued", "unknown"]


def test_without_a_cluster_or_its_client_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llmscale: Verb
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in (None, "broken"):
        monkeypatch.delenv("KUBECONFIG", raising=False)
        if file is not None:
            Path("broken").write_text("clusters: 7\n")
            monkeypatch.setenv("KUBECONFIG", file)
        printed = llmscale("submit", *WORDS, exit_code=3)
        assert "no cluster is configured here" in printed and len(printed.splitlines()) == 2
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert "pip install 'llmscale[k8s]'" in llmscale("submit", *WORDS, exit_code=3)


def test_a_name_that_is_too_long_is_refused_with_its_key(cluster: Cluster, llmscale: Verb) -> None:
    assert "error: run.name: " in llmscale("submit", *WORDS, f"run.name={'long' * 12}", exit_code=2)
    assert not cluster.asked


# ---------------------------------------------------------------- secrets, and --print


def test_no_secret_is_anywhere(
    cluster: Cluster, llmscale: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment of whoever submits stays where it is; pods are given a Secret by its name."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    (tmp_path / "kubeconfig").write_text((tmp_path / "kubeconfig").read_text() + f"# {CANARY}\n")
    printed = llmscale("submit", *WORDS, "launch.secrets=keys")
    printed += llmscale("submit", *WORDS, "run.name=other", "launch.secrets=keys", "--print")
    printed += llmscale("status", RUN)
    printed += llmscale("submit", *WORDS, f"data.train=http://me:{CANARY}@host/x", exit_code=2)
    written = [file.read_text() for file in Path("runs").rglob("*") if file.is_file()]
    assert head(cluster.only())["envFrom"] == [{"secretRef": {"name": "keys"}}]
    for text in (json.dumps(cluster.objects), printed, *written, *cluster.asked):
        assert CANARY not in text and "token-of-a-user" not in text


def test_print_is_yaml_alone_and_needs_no_heavy_library(tmp_path: Path) -> None:
    """Timed in its own process, beside one that does nothing: this machine may be busy."""
    code = (
        "import sys, resource\nfrom llmscale.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'ray', 'kubernetes', 'transformers'} & set(sys.modules)\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(heavy or used.ru_utime + used.ru_stime, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, "submit", *WORDS, "--print"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert yaml.safe_load(done.stdout)["kind"] == "RayJob" and done.returncode == 0
    assert float(done.stderr) < 1.5
    assert not list(tmp_path.iterdir())


def test_the_plan_names_the_place_on_the_volume(
    tmp_path: Path, llmscale: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = json.loads(llmscale("submit", *WORDS, "launch.mem_per_node=4Gi", "--dry-run", "--json"))
    assert planned["files"]["run_dir"] == "/llmscale/runs/demo/rlhf" and planned["nodes"] == 5
    assert planned["per_node"]["memory"] == "4Gi" and not list(tmp_path.iterdir())
