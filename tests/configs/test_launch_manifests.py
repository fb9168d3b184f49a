"""The manifests of configs/launch: what Kubernetes takes, with flags that the commands have, and parts that fit one another."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from deepseek_jax.config import DistributedConfig
from deepseek_jax.parallel.processes.joining import find
from deepseek_jax.serving.router import app as router_app
from deepseek_jax.serving.router.router import Router, Settings
from deepseek_jax.serving.server import app
from deepseek_jax.serving.server.running import _LATE
from experiments import serve
from experiments.mesh_flag import parse_mesh
from tests.configs.kubernetes_api import mistakes

FILES = sorted((Path(__file__).parents[2] / "configs" / "launch").glob("*.yaml"))
OF_LWS = {"LWS_LEADER_ADDRESS": "unit-0.unit.default", "LWS_GROUP_SIZE": "18", "LWS_WORKER_INDEX": "3"}
ASKED = (
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
)


PATHS = {
    "server": {route.path for route in app._OF_ITSELF},
    "router": router_app.application(Router(Settings()))._app._paths,
}


def manifests(path):
    return list(yaml.safe_load_all(path.read_text()))


ALL = [
    pytest.param(m, id=f"{path.stem}-{m['kind']}-{m['metadata']['name']}")
    for path in FILES
    for m in manifests(path)
]
EVERY = [param.values[0] for param in ALL]


def templates(manifest):
    """Pod templates, the one that answers HTTP first."""
    spec = manifest["spec"]
    group = spec.get("leaderWorkerTemplate", {})
    return [t for t in (spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")) if t]


PODS = [
    pytest.param(m, t, id=f"{m['metadata']['name']}-{i}") for m in EVERY for i, t in enumerate(templates(m))
]
SERVERS = [p for p in PODS if p.values[1]["spec"]["containers"][0]["command"][-1] == "experiments.serve"]


def read_flags(container):
    """The command's flags, as its own parser reads them. Raises what that raises."""
    values = copy.deepcopy(serve.FLAGS)
    rest = values(["serve", *container["args"]])
    assert rest == ["serve"], rest
    return values


def environment(container):
    """With $(NAME) as Kubernetes fills it in: what stands before, or comes from LeaderWorkerSet."""
    found = dict(OF_LWS)
    for entry in container["env"]:
        text = entry.get("value", "secret")
        assert set(re.findall(r"\$\((\w+)\)", text)) <= found.keys(), text
        found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], text)
    return found


@pytest.mark.parametrize("manifest", ALL)
def test_kubernetes_takes_it(manifest):
    assert mistakes(manifest) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["spec"].pop("selector"), "Deployment.spec.selector is missing"),
        (lambda m: m["spec"].update(replica=2), "Deployment.spec.replica is not known"),
        (lambda m: m.update(apiVersion="v1"), "Deployment.apiVersion='v1' must be {'apps/v1'}"),
        (lambda m: m["spec"].update(replicas="2"), "Deployment.spec.replicas='2' must be range"),
        (lambda m: _container(m)["env"][0].update(value=1), ".env[0].value=1 must be <class 'str'>"),
        (
            lambda m: _container(m)["ports"][0].update(containerPort=80_000),
            ".containerPort=80000 must be range",
        ),
        (lambda m: _container(m)["readinessProbe"].pop("httpGet"), ".readinessProbe.httpGet is missing"),
        (
            lambda m: _container(m)["resources"]["limits"].update(memory="8 GB"),
            ".memory='8 GB' is none of what",
        ),
        (lambda m: m["metadata"].update(name="Deep_Seek"), "metadata.name='Deep_Seek' must be"),
    ],
)
def test_mistakes_are_found(change, message):
    manifest = copy.deepcopy(
        next(m for m in EVERY if m["metadata"]["name"] == "deepseek" and m["kind"] == "Deployment")
    )
    change(manifest)
    [found] = mistakes(manifest)
    assert message in found


def _container(manifest):
    return manifest["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(("manifest", "template"), SERVERS)
def test_the_command_has_these_flags_and_devices(manifest, template):
    """Ports are those of the container, and the mesh those of all hosts; processes find one another."""
    [container] = template["spec"]["containers"]
    flags, ports = read_flags(container), [port["containerPort"] for port in container.get("ports", ())]
    assert flags.host == "0.0.0.0" and flags.port == 8000 and (not ports or flags.port in ports)
    group = manifest["spec"].get("leaderWorkerTemplate", {"size": 1})
    mesh = parse_mesh(flags.mesh)
    gpus = container["resources"].get("limits", {}).get("nvidia.com/gpu", 0)
    devices = 0 if mesh is None else mesh.data * mesh.node * mesh.local * mesh.tensor
    assert devices == group["size"] * gpus
    join = find(DistributedConfig(), environment(container) if group["size"] > 1 else {})
    if group["size"] > 1:
        assert (join.coordinator, join.processes, join.process) == ("unit-0.unit.default:1234", 18, 3)
        assert (
            group["size"] == int(OF_LWS["LWS_GROUP_SIZE"])
            and manifest["spec"]["startupPolicy"] == "LeaderCreated"
        )
    with pytest.raises(Exception, match="port"):
        read_flags({"args": [*container["args"], "--port=http"]})


@pytest.mark.parametrize(("manifest", "template"), SERVERS)
def test_it_is_asked_what_it_answers_and_gets_the_time_to_end(manifest, template):
    [container] = template["spec"]["containers"]
    paths = PATHS["router" if "--role=router" in container["args"] else "server"]
    named = {port["name"] for port in container.get("ports", ())}
    probes = [container[name]["httpGet"] for name in container if name.endswith("Probe")]
    assert len(probes) == (3 if named else 0)  # workers of a unit answer nothing
    assert all(probe["path"] in paths and probe["port"] in named for probe in probes)
    wait = int(
        container.get("lifecycle", {}).get("preStop", {"exec": {"command": ["sleep", "0"]}})["exec"][
            "command"
        ][1]
    )
    needed = wait + read_flags(container).grace + _LATE
    assert needed + 10 <= template["spec"]["terminationGracePeriodSeconds"] <= needed + 60


@pytest.mark.parametrize(("manifest", "template"), PODS)
def test_parts_of_a_pod_fit(manifest, template):
    spec = template["spec"]
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    assert {mount["name"] for c in spec["containers"] for mount in c.get("volumeMounts", ())} == volumes
    labels = template.get("metadata", {}).get("labels", {})
    if "selector" in manifest["spec"]:
        assert manifest["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("manifest", [m for m in EVERY if m["kind"] in ("Service", "InferencePool")])
def test_what_is_selected_is_there(manifest):
    spec = manifest["spec"]
    wanted = spec["selector"].get("matchLabels", spec["selector"])
    pods = [
        t
        for m in EVERY
        for t in templates(m)
        if wanted.items() <= t.get("metadata", {}).get("labels", {}).items()
    ]
    job = {m["metadata"]["name"] for m in EVERY if m["kind"] == "Job"}
    assert len(pods) == 1 or wanted.get("job-name") in job
    ports = [port for pod in pods for port in pod["spec"]["containers"][0]["ports"]]
    for port in spec.get("ports", ()):
        assert port["targetPort"] in [p["name"] for p in ports]
    for port in spec.get("targetPorts", ()):
        assert port["number"] in [p["containerPort"] for p in ports]


def test_servers_find_the_router_before_it_is_ready_and_all_share_its_keys():
    """A router is ready once there are servers."""
    services = {m["metadata"]["name"]: m["spec"] for m in EVERY if m["kind"] == "Service"}
    containers = [t["spec"]["containers"][0] for m in EVERY for t in templates(m)]
    joining = [c for c in containers if any(a.startswith("--router=") for a in c.get("args", ()))]
    for container in joining:
        url = re.fullmatch(r"http://([a-z-]+):(\d+)", read_flags(container).router)
        service = services[url[1]]
        assert service["publishNotReadyAddresses"] and service["ports"][0]["port"] == int(url[2])
        assert "DEEPSEEK_JAX_FLEET_KEY" in environment(container)
    assert len(joining) >= 4


def test_the_gateway_finds_the_metrics_that_it_asks_for():
    from deepseek_jax.serving.server.admission import Admission
    from deepseek_jax.serving.server.instruments import Instruments

    text = Instruments("tiny", Admission(1, 1)).text()
    for name in ASKED:
        assert (
            f"# TYPE {name} gauge\n" in text
            and name in next(p for p in FILES if p.stem == "gateway").read_text()
        )
    assert re.search(r'vllm:cache_config_info\{.*block_size="64",num_gpu_blocks="\d+"\} 1', text)
