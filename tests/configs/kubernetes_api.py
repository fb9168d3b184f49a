"""The part of Kubernetes' API that configs/launch uses, strictly: fields, types and what is required, as the published
references have it (core v1, apps/v1, batch/v1 of Kubernetes 1.34; LeaderWorkerSet v1; Gateway API v1; InferencePool v1).

A field that is not here is an error, though Kubernetes may have it: add it where a manifest needs it.
"""

import re
from collections.abc import Iterator
from typing import Any

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
PORT = range(1, 65536)
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
DURATION = re.compile(r"([0-9]{1,5}(h|m|s|ms)){1,4}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LABELS = {
    re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"): re.compile(
        r"[-A-Za-z0-9_.]{0,63}"
    )
}
ANNOTATIONS = {re.compile(r"([a-z0-9.-]+/)?[-A-Za-z0-9_.]{1,63}"): str}
AMOUNTS = {re.compile(r"cpu|memory|([a-z0-9.-]+/)[a-z0-9.-]+"): (QUANTITY, range(1 << 31))}

# A dict's fields; "!": required. A list of one: a list of that. A tuple: one of these. A set: one of these values.
METADATA = {"name!": NAME, "labels": LABELS, "annotations": ANNOTATIONS}
SELECTOR = {"matchLabels!": LABELS}
ENV = {
    "name!": VARIABLE,
    "value": str,
    "valueFrom": {"secretKeyRef": {"name!": NAME, "key!": str, "optional": bool}},
}
PROBE = {
    "httpGet!": {"path!": re.compile(r"/\S*"), "port!": (NAME, PORT)},
    "periodSeconds": range(1, 3601),
    "timeoutSeconds": range(1, 3601),
    "failureThreshold": range(1, 10_001),
    "initialDelaySeconds": range(3601),
}
CONTAINER = {
    "name!": NAME,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [ENV],
    "ports": [{"name": NAME, "containerPort!": PORT, "protocol": {"TCP", "UDP"}}],
    "startupProbe": PROBE,
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "lifecycle": {"preStop": {"exec!": {"command!": [str]}}},
    "resources": {"requests": AMOUNTS, "limits": AMOUNTS},
    "volumeMounts": [{"name!": NAME, "mountPath!": re.compile(r"/\S+"), "readOnly": bool}],
}
VOLUME = {
    "name!": NAME,
    "persistentVolumeClaim": {"claimName!": NAME, "readOnly": bool},
    "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": QUANTITY},
}
POD = {
    "containers!": [CONTAINER],
    "volumes": [VOLUME],
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "subdomain": NAME,
    "terminationGracePeriodSeconds": range(100_000),
}
TEMPLATE = {"metadata": {"labels": LABELS, "annotations": ANNOTATIONS}, "spec!": POD}
SOME = (re.compile(r"[0-9]+%"), range(1 << 31))


def _object(api: str, kind: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion!": {api}, "kind!": {kind}, "metadata!": METADATA, "spec!": spec}


KINDS = {
    "Service": _object(
        "v1",
        "Service",
        **{
            "selector!": LABELS,
            "ports": [{"name": NAME, "port!": PORT, "targetPort": (NAME, PORT)}],
            "clusterIP": {"None"},
            "publishNotReadyAddresses": bool,
        },
    ),
    "Deployment": _object(
        "apps/v1",
        "Deployment",
        **{
            "replicas": range(10_000),
            "selector!": SELECTOR,
            "strategy": {
                "type": {"RollingUpdate", "Recreate"},
                "rollingUpdate": {"maxSurge": SOME, "maxUnavailable": SOME},
            },
            "template!": TEMPLATE,
        },
    ),
    "Job": _object(
        "batch/v1",
        "Job",
        **{
            "completionMode": {"Indexed", "NonIndexed"},
            "completions": range(1, 100_000),
            "parallelism": range(100_000),
            "backoffLimit": range(1 << 31),
            "podFailurePolicy": {
                "rules!": [
                    {
                        "action!": {"FailJob", "FailIndex", "Ignore", "Count"},
                        "onExitCodes": {
                            "containerName": NAME,
                            "operator!": {"In", "NotIn"},
                            "values!": [range(256)],
                        },
                        "onPodConditions": [{"type!": str, "status!": {"True", "False", "Unknown"}}],
                    }
                ]
            },
            "template!": TEMPLATE,
        },
    ),
    "LeaderWorkerSet": _object(
        "leaderworkerset.x-k8s.io/v1",
        "LeaderWorkerSet",
        **{
            "replicas": range(10_000),
            "startupPolicy": {"LeaderCreated", "LeaderReady"},
            "leaderWorkerTemplate!": {
                "size": range(1, 10_000),
                "restartPolicy": {"RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"},
                "leaderTemplate": TEMPLATE,
                "workerTemplate!": TEMPLATE,
            },
        },
    ),
    "InferencePool": _object(
        "inference.networking.k8s.io/v1",
        "InferencePool",
        **{
            "selector!": SELECTOR,
            "targetPorts!": [{"number!": PORT}],
            "endpointPickerRef!": {
                "group": str,
                "kind": str,
                "name!": NAME,
                "port!": {"number!": PORT},
                "failureMode": {"FailOpen", "FailClose"},
            },
        },
    ),
    "HTTPRoute": _object(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        **{
            "parentRefs": [{"group": str, "kind": str, "name!": NAME}],
            "rules": [
                {
                    "matches": [{"path": {"type": {"Exact", "PathPrefix"}, "value": re.compile(r"/\S*")}}],
                    "backendRefs": [{"group": str, "kind": str, "name!": NAME, "port": PORT}],
                    "timeouts": {"request": DURATION, "backendRequest": DURATION},
                }
            ],
        },
    ),
}


def mistakes(manifest: Any) -> list[str]:
    """What is wrong with a manifest; nothing of one that Kubernetes takes."""
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    return [*_wrong(manifest, KINDS[kind], kind)] if kind in KINDS else [f"kind {kind!r} is not known"]


def _wrong(value: Any, want: Any, at: str) -> Iterator[str]:
    if isinstance(want, dict):
        yield from _wrong_object(value, want, at)
    elif isinstance(want, list):
        if not isinstance(value, list) or not value:
            yield f"{at}={value!r} must be a list that is not empty"
        else:
            for i, one in enumerate(value):
                yield from _wrong(one, want[0], f"{at}[{i}]")
    elif isinstance(want, tuple):
        if all([*_wrong(value, one, at)] for one in want):
            yield f"{at}={value!r} is none of what it may be"
    elif not _fits(value, want):
        yield f"{at}={value!r} must be {want}"


def _fits(value: Any, want: Any) -> bool:
    if isinstance(want, re.Pattern):
        return isinstance(value, str) and want.fullmatch(value) is not None
    if isinstance(want, range):
        return type(value) is int and value in want
    return value in want if isinstance(want, set) else type(value) is want


def _wrong_object(value: Any, want: dict[Any, Any], at: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{at}={value!r} must be an object"
        return
    if any(isinstance(name, re.Pattern) for name in want):  # names are free, of one form
        [(names, of)] = want.items()
        for name, one in value.items():
            yield from _wrong(name, names, f"a name of {at}")
            yield from _wrong(one, of, f"{at}.{name}")
        return
    known = {name.rstrip("!"): of for name, of in want.items()}
    for name in want:
        if name.endswith("!") and name[:-1] not in value:
            yield f"{at}.{name[:-1]} is missing"
    for name, one in value.items():
        if name in known:
            yield from _wrong(one, known[name], f"{at}.{name}")
        else:
            yield f"{at}.{name} is not known"
