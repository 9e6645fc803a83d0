"""Check Kubernetes manifests without a cluster.

Kubernetes' fields are checked against its own schemas, KubeRay's against schemas/kuberay.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.37"
SCHEMA = yaml.safe_load((Path(__file__).parent / "schemas" / "kuberay.yaml").read_text())


def check_manifest(manifest: dict[str, Any]) -> None:
    """Check a manifest.

    Raises jsonschema.ValidationError for a field that Kubernetes or KubeRay would refuse or drop.
    """
    if manifest["apiVersion"] == "ray.io/v1":
        _Validator(SCHEMA).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def pod_templates(manifest: Any) -> Iterator[dict[str, Any]]:
    """Yield all pod templates of a manifest, at any depth: mappings whose `spec` has containers."""
    if isinstance(manifest, dict):
        if "containers" in manifest.get("spec", {}):
            yield manifest
        for value in manifest.values():
            yield from pod_templates(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pod_templates(value)


def _whole(kind: str, part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of Kubernetes that holds `part`, the fields of a kind."""
    metadata = {"name": "part"}
    if kind == "ObjectMeta":
        return {"apiVersion": "v1", "kind": "Namespace", "metadata": part}
    if kind == "Service":
        return {"apiVersion": "v1", "kind": "Service", **part}
    if kind == "Container":  # it has other fields too, which the schema itself describes
        fields = {
            name: value for name, value in part.items() if schema["properties"].get(name) is True
        }
        part = {"spec": {"containers": [{"name": "part", **fields}]}}
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": part}


def _by_kubernetes(
    _validator: Any, kind: str, part: Any, schema: dict[str, Any]
) -> Iterator[jsonschema.ValidationError]:
    try:
        kubernetes_validate.validate(_whole(kind, part, schema), KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        yield jsonschema.ValidationError(error.message)


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {"x-kubernetes": _by_kubernetes}
)
