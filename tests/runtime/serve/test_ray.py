"""Replicas in a real Ray Serve on this machine, behind the real server: `make .venv-ray/.installed` makes its environment."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from serving import Answering, Served, serving

from motionrt.benchmarks.serving.ray_here import MOTIONRT, RayHere

DEMO = Path(__file__).resolve().parents[3] / "demo"
STILL = DEMO / "inputs" / "red_star.png"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MOTIONRT.exists(), reason="Ray is not installed: make .venv-ray/.installed"),
]
SCALING = ["downscale_delay_s=1", "upscale_delay_s=0", "metrics_interval_s=0.5", "look_back_period_s=1"]
reported: list[str] = []


class Reports(BaseHTTPRequestHandler):
    """Where Ray would report its use."""

    def do_POST(self) -> None:
        reported.append(self.path)
        self.send_response(200)
        self.end_headers()


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHere]:
    """Ray with one or two replicas of the demo's bundle, as many as there are jobs."""
    options = ["--replicas=1-2", *(f"--autoscaling={text}" for text in SCALING)]
    with Answering(Reports) as reports:
        env = {"RAY_USAGE_STATS_REPORT_URL": reports.url, "RAY_USAGE_STATS_REPORT_INTERVAL_S": "1"}
        env["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] = "0.1"
        with RayHere(tmp_path_factory.mktemp("ray"), DEMO / "bundle", DEMO / "memory", options, env=env) as running:
            yield running
    assert not running.replicas()


@pytest.fixture(scope="module")
def served(ray: RayHere, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    store = tmp_path_factory.mktemp("served") / "store"
    with serving(store, DEMO / "bundle", DEMO / "memory", f"--replicas={ray.url}", "--workers=2") as running:
        yield running


def until(done: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(served: Served, jobs: list[str]) -> list[dict[str, Any]]:
    found = [served.until(job, "completed", "failed", seconds=120) for job in jobs]
    assert [job["status"] for job in found] == ["completed"] * len(jobs), [job["error"] for job in found]
    return found


def test_jobs_are_spread_over_replicas_that_come_and_go_with_them(served: Served, ray: RayHere) -> None:
    until(lambda: len(ray.replicas()) == 1)
    job = served.create(STILL, seed=1)["id"]
    (alone,) = ended(served, [job])
    by = {alone["motionrt"]["replica"]}
    digest = alone["motionrt"]["frames_sha256"]
    start = time.monotonic()
    while len(by) < 2:  # the second one is started, and takes some
        assert time.monotonic() < start + 60
        found = ended(served, [served.create(STILL, steps=50)["id"] for _ in range(4)])
        by |= {job["motionrt"]["replica"] for job in found}
        assert {job["motionrt"]["attempt"] for job in found} == {1}
    (again,) = ended(served, [served.create(STILL, seed=1)["id"]])
    assert again["motionrt"]["frames_sha256"] == digest  # whoever makes it
    until(lambda: len(ray.replicas()) == 1)  # nothing to do


def test_the_kill_of_a_replica_loses_no_job(served: Served, ray: RayHere) -> None:
    jobs = [served.create(STILL, seed=seed, steps=50, n=4)["id"] for seed in range(8)]
    until(lambda: len(ray.replicas()) == 2)
    until(lambda: any(served.get(job)["motionrt"]["step"] > 0 for job in jobs))
    running = ray.replicas()
    for pid in running:  # whichever runs one
        os.kill(pid, 9)
    found = ended(served, jobs)
    attempts = [job["motionrt"]["attempt"] for job in found]
    assert max(attempts) == 2, attempts  # it was in the middle of one at least, and that was begun once more
    assert not set(running) & set(ray.replicas())
    assert all(len(job["motionrt"]["frames_sha256"]) == 4 for job in found)


def test_a_cancel_leaves_the_replica_idle(served: Served, ray: RayHere) -> None:
    until(lambda: len(ray.replicas()) == 1)
    ended(served, [served.create(STILL)["id"]])
    (replica,) = ray.replicas()
    job = served.create(STILL, steps=50, n=8)["id"]
    until(lambda: served.get(job)["motionrt"]["step"] > 2)
    assert served.call("POST", f"/v1/videos/{job}/cancel").json["error"]["code"] == "cancelled"
    time.sleep(0.2)
    before = cpu(replica)
    time.sleep(1.0)
    assert cpu(replica) - before < 0.3  # the job had seconds to go


def test_ray_takes_what_deploy_writes(tmp_path: Path) -> None:
    both = ["--bundle", f"a={DEMO / 'bundle'}", "--bundle", f"b={DEMO / 'motion_i2v' / 'bundle'}", "--replicas=0-3"]
    command = [MOTIONRT, "deploy", "ray", *both, "--multiplex", "--device=cuda", "--out", tmp_path / "ray.yaml"]
    subprocess.run(command, check=True, capture_output=True)
    code = "import sys, yaml; from ray.serve import schema as s; s.ServeDeploySchema(**yaml.safe_load(open(sys.argv[1])))"
    subprocess.run([MOTIONRT.with_name("python"), "-c", code, tmp_path / "ray.yaml"], check=True)


def test_nothing_is_reported_and_no_dashboard_listens(served: Served, ray: RayHere) -> None:
    assert reported == []
    assert "dashboard at" not in ray.log.read_text()


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
