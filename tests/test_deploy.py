"""The files of deploy/, as far as they can be checked without a daemon: they parse, name what exists, and run as nobody."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from motionrt.runtime.cli.main import app as command_line
from motionrt.runtime.serve.metrics import Metrics
from motionrt.runtime.serve.run import CONNECTIONS
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.web.answers import _FULL
from motionrt.runtime.serve.web.connections import guarded_protocol
from motionrt.runtime.serve.web.form import FormLimits
from motionrt.runtime.serve.web.limits import Pace
from motionrt.runtime.serve.work.order import MOST_SEEDS, PIXELS

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
FILES = {
    *DOCKERFILES, "compose.yaml", "prometheus.yaml", "alerts.yaml", "grafana-dashboard.json", "motionrt.service", "nginx.conf",
    "Caddyfile", "kubernetes.yaml", "kserve.yaml",
}  # fmt: skip
SUFFIX = {"counter": "_total", "gauge": "", "histogram": ""}


def text(name: str) -> str:
    return (DEPLOY / name).read_text()


def read(name: str) -> Any:
    return yaml.safe_load(text(name)) if name.endswith(".yaml") else json.loads(text(name))


def manifests(name: str) -> list[Any]:
    return list(yaml.safe_load_all(text(name)))


def one_of(items: list[Any], kind: str) -> Any:
    (found,) = (item for item in items if item["kind"] == kind)
    return found


def test_every_file_of_the_folder_is_tested_here() -> None:
    assert {path.name for path in DEPLOY.iterdir()} - {"prometheus.key"} == FILES


# --- command lines


def lines(name: str) -> Iterator[list[str]]:
    """Every command line of `motionrt` in a file: in its comments, in ExecStart, in `command`."""
    plain = re.sub(r"\\\n(#\s*)?", " ", text(name))
    for line in plain.splitlines():
        found = re.search(r"(?:\bmotionrt(?::cpu|:cuda)?|\bserver) +((?:serve|keys|deploy) .*)", line)
        if found is not None and "docker build" not in line and line.lstrip().startswith(("#", "ExecStart")):
            yield shlex.split(found[1].partition(" > ")[0].partition(" && ")[0])
    if name == "compose.yaml":
        yield read(name)["services"]["server"]["command"]
    if name == "kubernetes.yaml":
        yield one_of(manifests(name), "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    if name in DOCKERFILES:
        yield next(json.loads(arguments) for word, arguments in instructions(name) if word == "CMD")


@pytest.mark.parametrize("name", sorted(FILES - {"grafana-dashboard.json", "alerts.yaml"}))
def test_every_command_line_is_one_that_motionrt_takes(name: str) -> None:
    found = list(lines(name))
    assert found
    for arguments in found:
        parse(arguments)


def parse(arguments: list[str]) -> None:
    """What the command does before it does anything: ends where an option is wrong or missing."""
    command: Any = typer.main.get_command(command_line)
    rest = list(arguments)
    while hasattr(command, "commands"):  # a group
        command = command.commands[rest.pop(0)]
    if rest != ["--help"]:
        command.make_context("motionrt", rest)


@pytest.mark.parametrize("wrong", [["--wrong=1"], ["--port=x"], ["spare"]], ids=["option", "value", "argument"])
def test_a_wrong_command_line_would_be_noticed(wrong: list[str]) -> None:
    parse(["serve", "--bundle=a", "--store=b"])
    with pytest.raises(Exception, match=r"wrong|valid|unexpected"):
        parse(["serve", "--bundle=a", "--store=b", *wrong])


# --- images


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile as (instruction, arguments)."""
    plain = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text(name)))
    parts = (line.partition(" ") for line in plain.splitlines())
    return [(word.upper(), rest.strip()) for word, _, rest in parts if word.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_made_of_pinned_parts_and_run_as_nobody(name: str) -> None:
    steps = instructions(name)
    words = [word for word, _ in steps]
    assert "ADD" not in words and "MAINTAINER" not in words and words[0] == "FROM"
    for word, arguments in steps:
        if word == "FROM":
            image, _, tag = arguments.split()[0].partition(":")
            assert image and re.search(r"\d+\.\d+", tag) and "latest" not in tag
        if word in ("ENTRYPOINT", "CMD", "VOLUME"):
            assert isinstance(json.loads(arguments), list)  # not through a shell, which keeps signals to itself
        if word == "RUN":
            assert "sudo" not in arguments and "curl" not in arguments and "| sh" not in arguments
            if "pip install" in arguments:
                assert arguments.count("pip install") == arguments.count("--no-cache-dir")
                assert all("-r requirements/" in one or "--no-deps ." in one for one in arguments.split("pip install")[1:])
            if "apt-get install" in arguments:
                assert "--no-install-recommends" in arguments and "rm -rf /var/lib/apt/lists" in arguments
                assert arguments.startswith("apt-get update")
        if word == "COPY" and not arguments.startswith("--from="):
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert allowed(source), f"{source} is not in the context: .dockerignore leaves it out"
    last = steps[len(words) - 1 - words[::-1].index("FROM") :]  # the stage that is run
    (user,) = (arguments for word, arguments in last if word == "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)  # numbers: Kubernetes' runAsNonRoot cannot tell from a name
    (volume,) = (json.loads(arguments) for word, arguments in last if word == "VOLUME")
    assert volume == ["/data"] and any("-o 10001" in arguments and "/data" in arguments for _, arguments in last)
    assert words.count("HEALTHCHECK") == 1 and "/health/live" in dict(last)["HEALTHCHECK"]
    assert not any(word == "COPY" and not arguments.startswith("--from=") for word, arguments in last)


def allowed(source: str) -> bool:
    """Whether `.dockerignore`, which names what is let through, has a path."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    return source.split("/")[0] in kept


def test_the_context_has_what_the_package_is_made_of_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*" and lines[-1] == "**/__pycache__"  # the last one that fits decides
    assert all((ROOT / line[1:]).exists() for line in lines[1:-1])
    assert "demo" not in "".join(lines) and ".git" not in "".join(lines)


# --- compose and Prometheus


def test_compose_keeps_the_server_in_its_bounds() -> None:
    compose = read("compose.yaml")
    server = compose["services"]["server"]
    assert server["read_only"] is True and server["cap_drop"] == ["ALL"] and "no-new-privileges:true" in server["security_opt"]
    assert server["mem_limit"] and server["tmpfs"] == ["/tmp"] and float(server["stop_grace_period"].rstrip("s")) > 30
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert re.search(r":(v?\d+\.\d+\.\d+|cpu)$", service["image"])
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).exists() and mode == ["ro"], volume
            else:
                assert source in compose["volumes"]
    configs = {name: yaml.safe_load(one["content"]) for name, one in compose["configs"].items()}
    (source,), (provider,) = configs["datasource"]["datasources"], configs["dashboards"]["providers"]
    assert source["uid"] == "prometheus" and source["url"] == "http://prometheus:9090"
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def test_compose_is_told_what_it_requires_before_its_first_command() -> None:
    """A variable that must be set must be for every command of compose, `run` too: it reads the whole file each time."""
    required = re.findall(r"\$\{(\w+):\?", text("compose.yaml"))
    assert required
    for name in ("deploy/compose.yaml", "docs/serve.md"):
        plain = (ROOT / name).read_text()
        for variable in required:
            assert 0 < plain.find(f"export {variable}=") < plain.find("docker compose"), name


def test_prometheus_asks_the_server_with_its_key() -> None:
    config, services = read("prometheus.yaml"), read("compose.yaml")["services"]
    (scrape,) = config["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["server:8420"] and "server" in services
    secret = Path(scrape["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets") and secret.name in services["prometheus"]["secrets"]
    assert all((DEPLOY / name).is_file() for name in config["rule_files"])


@pytest.fixture(scope="module")
def series() -> set[str]:
    """Names of all series that a server can have, Prometheus' own `up` too."""
    metrics = Metrics("1", ["a"])
    families = text_string_to_metric_families(metrics.render().decode())
    names = {"up"}
    for family in families:
        if family.type == "histogram":
            names |= {f"{family.name}{end}" for end in ("_bucket", "_sum", "_count")}
        else:
            names.add(f"{family.name}{SUFFIX.get(family.type, '')}")
    return names


def named(expression: str) -> set[str]:
    """What an expression takes for series: words outside of texts, labels and functions."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", expression)
    bare = re.sub(r"\b(by|on|without|group_left|ignoring) *\([^)]*\)", "", bare)
    words = re.findall(r"\b[a-z_]+\b(?! *\()", bare)
    return set(words) - {"or", "and", "unless", "by", "sum", "group_left"}


def test_alerts_are_of_series_that_exist_and_say_what_to_do(series: set[str]) -> None:
    (group,) = read("alerts.yaml")["groups"]
    assert len(group["rules"]) == 4 and len({rule["alert"] for rule in group["rules"]}) == 4
    job = read("prometheus.yaml")["scrape_configs"][0]["job_name"]
    for rule in group["rules"]:
        assert named(rule["expr"]) and named(rule["expr"]) <= series, rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert all(name == job for name in re.findall(r'job="(\w+)"', rule["expr"]))
        assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["action"].endswith(".")
        told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"])))) | {"instance"}
        assert told <= kept, f"{rule['alert']} tells of labels that its expression drops"


def test_the_dashboard_shows_every_metric_and_no_other(series: set[str]) -> None:
    dashboard = read("grafana-dashboard.json")
    shown: set[str] = set()
    for panel in dashboard["panels"]:
        assert panel["title"] and panel["targets"] and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert named(target["expr"]) <= series, target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["datasource"]["uid"] == "prometheus"
            shown |= named(target["expr"])
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})
    own = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in series if name.startswith("motionrt_")}
    own -= {name for name in own if name.endswith("_created")}
    assert own == {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown if name.startswith("motionrt_")}
    (variable,) = dashboard["templating"]["list"]
    assert set(re.findall(r"\$(\w+)", json.dumps(dashboard))) <= {variable["name"], "__rate_interval", "__all"}


# --- Kubernetes


@pytest.mark.parametrize(
    ("name", "kind", "user"), [("kubernetes.yaml", "Pod", 10001), ("kubernetes.yaml", "Deployment", 10001),
                               ("kserve.yaml", "ServingRuntime", 1000)],
)  # fmt: skip
def test_pods_run_as_nobody_and_write_to_their_volumes_alone(name: str, kind: str, user: int) -> None:
    spec = one_of(manifests(name), kind)["spec"]
    spec = spec["template"]["spec"] if kind == "Deployment" else spec
    (container,) = spec["containers"]
    bounds = {**spec.get("securityContext", {}), **container["securityContext"]}
    assert bounds["runAsNonRoot"] is True and bounds["runAsUser"] == user and bounds["readOnlyRootFilesystem"] is True
    assert bounds["allowPrivilegeEscalation"] is False and bounds["capabilities"] == {"drop": ["ALL"]}
    assert bounds["seccompProfile"] == {"type": "RuntimeDefault"} and container["resources"]["limits"]["memory"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    if name == "kubernetes.yaml":
        assert spec["automountServiceAccountToken"] is False
        assert any(word == "USER" and value == f"{user}:{bounds['runAsGroup']}" for word, value in instructions("Dockerfile"))


def test_the_deployment_is_probed_reached_and_ended_as_the_server_says() -> None:
    items = manifests("kubernetes.yaml")
    deployment = one_of(items, "Deployment")["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    given = dict(part.removeprefix("--").split("=", 1) for part in container["args"][1:])
    source = (ROOT / "runtime/serve/app.py").read_text()
    for probe in ("startup", "ready", "live"):
        asked = container[{"startup": "startupProbe", "ready": "readinessProbe", "live": "livenessProbe"}[probe]]["httpGet"]
        assert asked == {"path": f"/health/{probe}", "port": "http"} and f'"/health/{probe}"' in source
    assert container["ports"] == [{"name": "http", "containerPort": options("serve")["--port"]}]
    assert pod["terminationGracePeriodSeconds"] > float(given["drain"]) and given["host"] == "0.0.0.0"
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    for name, only_read in {"bundle": True, "memory": True, "keys": True, "store": False}.items():
        assert mounts[f"/{given[name].split('/')[1]}"] is only_read, name
    assert deployment["replicas"] == 1 and deployment["strategy"] == {"type": "Recreate"}  # the store has one owner
    service = one_of(items, "Service")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"] == labels == deployment["selector"]["matchLabels"]
    assert service["ports"][0]["targetPort"] == "http"
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    assert claims == {item["metadata"]["name"] for item in items if item["kind"] == "PersistentVolumeClaim"}


def test_kserve_s_service_is_of_its_runtime() -> None:
    items = manifests("kserve.yaml")
    runtime, service = one_of(items, "ServingRuntime"), one_of(items, "InferenceService")
    model, (container,) = service["spec"]["predictor"]["model"], runtime["spec"]["containers"]
    assert model["runtime"] == runtime["metadata"]["name"] and container["name"] == "kserve-container"
    assert model["modelFormat"]["name"] in [one["name"] for one in runtime["spec"]["supportedModelFormats"]]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    claim = one_of(items, "PersistentVolumeClaim")["metadata"]["name"]
    assert model["storageUri"] == f"pvc://{claim}/repository"
    assert "--model-repository=/mnt/models" in container["args"]  # where KServe puts what storageUri names
    (port,) = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["containerPort"]
    assert f"--http-port={port['containerPort']}" in container["args"]


SCHEMAS = ROOT / ".venv-kubernetes"


@pytest.mark.slow
@pytest.mark.skipif(
    not (SCHEMAS / ".installed").exists(), reason="their schemas are not installed: make .venv-kubernetes/.installed"
)
def test_manifests_fit_the_schemas_of_kubernetes_and_kserve(tmp_path: Path) -> None:
    """And a change in each that does not fit is noticed, wherever it is."""
    changes = {
        "kubernetes.yaml": ("containerPort: 8420", 'containerPort: "8420"'),
        "kserve.yaml": ("      runtime: ", "      runTime: "),
        "kserve-pod.yaml": ("readOnlyRootFilesystem", "readonlyRootFilesystem"),
    }  # fmt: skip
    for name, (before, after) in changes.items():
        good = text(name.replace("-pod", ""))
        assert good.count(before) == 1
        (tmp_path / f"wrong-{name}").write_text(good.replace(before, after))
    paths = [DEPLOY / "kubernetes.yaml", DEPLOY / "kserve.yaml", *sorted(tmp_path.iterdir())]
    command = [SCHEMAS / "bin/python", "-P", ROOT / "tests/helpers/kubernetes_schemas.py", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = {name: faults for name, faults in found.items() if not name.startswith("wrong-")}
    assert len(ours) == 8 and not any(ours.values()), ours
    wrong = {name: faults for name, faults in found.items() if name.startswith("wrong-") and faults}
    assert [" ".join(name.split()[:2]) for name in wrong] == [
        "wrong-kserve-pod.yaml ServingRuntime", "wrong-kserve.yaml InferenceService", "wrong-kubernetes.yaml Deployment",
    ]  # fmt: skip


# --- systemd, nginx, Caddy


def test_the_unit_runs_as_nobody_within_bounds() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)  # SystemCallFilter comes twice
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text("motionrt.service"))
    service = unit["Service"]
    wanted = {"DynamicUser": "yes", "ProtectSystem": "strict", "NoNewPrivileges": "yes", "CapabilityBoundingSet": ""}
    assert wanted.items() <= dict(service).items()
    assert service["OOMPolicy"] == "continue"  # a worker beyond MemoryMax is started again by the server, which goes on
    assert service["MemoryMax"] and int(service["TasksMax"]) and service["StateDirectory"] == "motionrt"
    command = shlex.split(service["ExecStart"])
    options = dict(part.removeprefix("--").split("=", 1) for part in command[2:])
    assert command[:2] == ["/opt/motionrt/bin/motionrt", "serve"]
    for name in ("store", "keys"):  # where the unit may write
        assert options[name].startswith("/var/lib/motionrt/")
    assert float(service["TimeoutStopSec"]) > float(options["drain"]) and service["KillMode"] == "mixed"


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_proxies_pass_events_on_at_once_and_bodies_up_to_the_limit(name: str) -> None:
    plain = re.sub(r"(?m)#.*$", "", text(name))
    assert plain.count("{") == plain.count("}")
    size = re.search(r"(?:client_max_body_size|max_size) +(\d+)(?:m|MiB)", plain)
    assert size is not None and int(size[1]) << 20 == FormLimits().body
    if name == "nginx.conf":
        for block in re.findall(r"location [^{]*\{[^}]*proxy_pass[^}]*\}", plain):
            assert "proxy_set_header Host $http_host;" in block and "proxy_http_version 1.1;" in block
        events = re.search(r"location ~ (\S+) \{([^}]*)\}", plain)
        assert events is not None and "proxy_buffering off;" in events[2] and re.search(events[1], "/v1/videos/video_1/events")
        assert "$proxy_add_x_forwarded_for" not in plain  # would hand on what a client made up
    else:
        assert "flush_interval -1" in plain and "trusted_proxies" not in plain
    assert "/metrics" in plain and "127.0.0.1:8420" in plain


# --- the page about it


def page() -> str:
    return (ROOT / "docs/serve.md").read_text()


def options(*path: str) -> dict[str, Any]:
    """Options of a command with their defaults, but for those that every command that runs a graph takes."""
    command: Any = typer.main.get_command(command_line)
    for name in path:
        command = command.commands[name]
    common = {"--backend", "--device", "--threads", "--allow-onnxruntime", "--allow-cpu", "--precision", "--engines"}
    every = {option: one.default for one in command.params for option in one.opts if option.startswith("--")}
    return {option: default for option, default in every.items() if option not in {*common, "--low-memory"}}


def test_the_page_has_every_option_and_no_other() -> None:
    known = options("serve") | options("keys", "create")
    typed = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"docker .*", "", page())))
    others = set(options("preview", "calibrate"))
    assert typed <= set(known) | others, typed - set(known) - others
    left_out = {"--port", "--batch", "--batch-rounding", "--no-page", "--example"}  # their help says it all
    assert set(known) - left_out <= typed, set(known) - left_out - typed


def test_the_page_s_limits_are_those_of_the_program() -> None:
    rows = [row.strip("| ").split(" | ") for row in page().splitlines() if row.startswith("| ") and row.count("|") == 5]
    limits = {row[0]: row[1:] for row in rows}
    serve = options("serve")
    for name, option in {
        "jobs that wait": "--queue", "hours that a finished job is kept": "--lifetime", "GiB of finished videos": "--storage",
        "seconds that running jobs have when the server stops": "--drain",
    }.items():  # fmt: skip
        assert float(limits[name][0]) == serve[option] and limits[name][1] == f"`{option}`"
    form, pace, bounds = FormLimits(), Pace(), guarded_protocol.__kwdefaults__
    settings = {one.name: one.default for one in fields(Settings)}
    told = {
        "bytes of a request": f"{settings['body'] >> 20} MiB",
        "pixels of a picture, as its file stores it": f"{PIXELS // 10**6} million",
        "bytes of a request that adds a clip to a memory": f"{settings['clips'] >> 20} MiB",
        "bytes of one text, number of fields": f"{form.field >> 10} KiB, {form.fields}",
        "bytes of JSON, without its data URLs": f"{form.json >> 10} KiB", "seeds of one request (`n`)": str(MOST_SEEDS),
        f"speed of an upload, after {pace.grace:g} s": f"{pace.rate / 1024:g} KiB/s on average",
        "time of an upload": f"{pace.total:g} s, and 1 s for each MiB", "connections": str(CONNECTIONS),
        "time until the head of a request is there": f"{bounds['seconds']} s", "disk in use": f"{100 * _FULL:g} %",
        "connections of one address": str(bounds["connections"]),
    }  # fmt: skip
    assert {name: limits[name][0] for name in told} == told
    codes = set(re.findall(r"`([a-z]+_[a-z_]+)`", " ".join(row[-1] for row in limits.values())))
    source = "".join(path.read_text() for path in (ROOT / "runtime/serve").rglob("*.py"))
    assert codes and all(f'"{code}"' in source for code in codes)


def test_the_page_tells_of_every_metric(series: set[str]) -> None:
    told = set(re.findall(r"motionrt_[a-z_]+", page().split("## Metrics")[1].split("## The log")[0]))
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series if name.startswith("motionrt_")}
    assert told == {name for name in bare if not name.endswith("_created")}


def test_the_page_is_short_and_names_files_that_exist() -> None:
    assert len(page().splitlines()) < 200
    named = set(re.findall(r"(?:deploy|docs)/[\w.-]+[a-z]", page()))
    assert {f"deploy/{name}" for name in FILES} <= named and all((ROOT / name).exists() for name in named)
